"""Prompts -> conditioning. Each encoder is loaded, used and freed before the next."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hybridiff.errors import printable, remedy, require_finite
from models.tokenizers import Cut
from weights.load import Checkpoint


def cuts(checkpoint: Checkpoint, prompt: str, negative_prompt: str | None) -> list[str]:
    """What the text encoders leave out of the two texts, a sentence for each cut: encoders that cut a text alike share one."""
    sentences = []
    for name, text in (("prompt", prompt), ("negative prompt", negative_prompt or "")):
        encoders: dict[Cut, list[str]] = {}
        for part in checkpoint.text_encoders:
            if cut := checkpoint.tokenizer(part).cut(text):
                encoders.setdefault(cut, []).append(part)
        for cut, parts in encoders.items():
            *others, last = parts
            readers = f"{', '.join(others)} and {last} read" if others else f"{last} reads"
            sentences.append(
                f"the {name} is cut: {readers} {cut.read} of its {cut.tokens:,} tokens; left out: {excerpt(cut.left_out)}"
            )
    return sentences


def excerpt(text: str) -> str:
    """A text in quotes, on one line; where it is long, how it begins and ends."""
    if len(text) <= 300:
        return f'"{printable(text)}"'
    return f'"{printable(text[:200])} ... {printable(text[-80:])}" ({len(text):,} characters)'


def run_encoder(
    checkpoint: Checkpoint,
    part: str,
    texts: list[str],
    device: torch.device,
    dtype: torch.dtype,
    stored: bool = False,
) -> list:
    """Run one text encoder over the texts, one by one (batch 1, so that a text's result never depends on the others)."""
    if not texts:  # nothing is loaded where there is nothing to encode
        return []
    tokenizer, encoder = checkpoint.tokenizer(part), checkpoint.load(part, dtype, device, stored=stored)
    results = [encoder(tokenizer(text).to(device)) for text in texts]
    other = "take a file with another text encoder"
    for result in results:
        named = {"text": result} if isinstance(result, Tensor) else dict(zip(("text", "pooled text"), result))
        for name, tensor in named.items():
            if tensor is not None:
                require_finite(
                    tensor, f"text encoder {part}", name, lambda: remedy(checkpoint, part, dtype, other)
                )
    return results


@torch.inference_mode()
def encode(
    checkpoint: Checkpoint,
    prompt: str,
    negative_prompt: str | None,
    height: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
    t5: str | None = "device",
    branches: Sequence[str] = ("cond", "uncond"),
) -> dict[str, Any]:
    """The conditioning of the branches asked for, batch 1, in `dtype` on `device`; sizes in pixels.

    `t5`: "device", "cpu" (T5 runs there, in fp32) or "fp8" (its stored fp8 weights stay so on the device and are brought to `dtype`
    layer by layer, as they always are on the CPU, where T5 is the mapped file and takes no memory of its own).
    Without a negative prompt the empty text is encoded, or zeros stand for it (`Checkpoint.zero_negative`).
    """

    def run(part: str, texts: list[str]) -> list:
        """What an encoder makes of texts: a tensor each, or a pair with the pooled text."""
        if part != "t5":
            return run_encoder(checkpoint, part, texts, device, dtype)
        place, precision = (torch.device("cpu"), torch.float32) if t5 == "cpu" else (device, dtype)
        stored = t5 == "fp8" or place.type == "cpu"
        return [text.to(device) for text in run_encoder(checkpoint, part, texts, place, precision, stored)]

    return conditioning_of(checkpoint, run, prompt, negative_prompt, (height, width), branches, device, dtype)


def meta_encode(checkpoint: Checkpoint, height: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """The conditioning of both branches on the meta device: shapes and dtypes."""
    lengths = text_lengths(checkpoint)

    def run(part: str, texts: list[str]) -> list:
        encoder = checkpoint.part(part).module.to(dtype)
        ids = torch.empty(1, lengths[part], dtype=torch.long, device="meta")
        return [encoder(ids) for _ in texts]

    size, branches = (height, width), ("cond", "uncond")
    return conditioning_of(checkpoint, run, "", "", size, branches, torch.device("meta"), dtype)


def conditioning_of(
    checkpoint: Checkpoint,
    run: Callable[[str, list[str]], list],
    prompt: str,
    negative_prompt: str | None,
    size: tuple[int, int],
    branches: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Branch -> what the family makes of its text by `run(part, texts)`."""
    absent = None if checkpoint.zero_negative else ""
    texts = {"cond": prompt, "uncond": absent if negative_prompt is None else negative_prompt}
    like = torch.empty(0, device=device, dtype=dtype)
    encoded = checkpoint.model.encode(
        run, [texts[branch] for branch in branches], size, checkpoint.configs, text_lengths(checkpoint), like
    )
    return dict(zip(branches, encoded))


def text_lengths(checkpoint: Checkpoint) -> dict[str, int]:
    """Text encoder -> tokens that it reads; T5's also where there is none."""
    lengths = {part: getattr(checkpoint.config(part), "positions", None) for part in checkpoint.text_encoders}
    return {part: length or checkpoint.t5_length for part, length in lengths.items()} | {
        "t5": checkpoint.t5_length
    }
