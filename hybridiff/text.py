"""Prompts -> what the denoiser is told, for both families. Each encoder is loaded, used and freed before the next."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridiff.ending import shown
from hybridiff.errors import remedy, require_finite
from models.embeddings import sinusoid
from models.mmdit import MMDiTConditioning
from models.tokenizers import Cut
from models.unet import UNetConditioning
from weights.load import Checkpoint


def cuts(checkpoint: Checkpoint, prompt: str, negative_prompt: str | None) -> list[str]:
    """What the text encoders leave out of the two texts, a sentence for each cut: encoders that cut a text alike share one."""
    sentences = []
    for name, text in (("prompt", prompt), ("negative prompt", negative_prompt or "")):
        encoders: dict[Cut, list[str]] = {}
        for part in ("clip_l", "clip_g", "t5"):
            if part in checkpoint.parts and (cut := checkpoint.tokenizer(part).cut(text)):
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
        return f'"{shown(text)}"'
    return f'"{shown(text[:200])} ... {shown(text[-80:])}" ({len(text):,} characters)'


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
    t5: str = "device",
    branches: Sequence[str] = ("cond", "uncond"),
) -> dict[str, UNetConditioning] | dict[str, MMDiTConditioning]:
    """The conditioning of the branches asked for, batch 1, in `dtype` on `device`; sizes in pixels.

    `t5`: "device", "cpu" (T5 runs there, in fp32) or "fp8" (its stored fp8 weights stay so on the device and are brought to `dtype`
    layer by layer, as they always are on the CPU, where T5 is the mapped file and takes no memory of its own).
    """
    texts = {branch: {"cond": prompt, "uncond": negative_prompt}[branch] for branch in branches}
    if checkpoint.family == "sdxl":
        return encode_sdxl(checkpoint, texts, height, width, device, dtype)
    return encode_sd3(checkpoint, texts, device, dtype, t5)


def encode_sdxl(checkpoint, texts, height, width, device, dtype) -> dict[str, UNetConditioning]:
    """SDXL: penultimate states of CLIP-L and bigG side by side; bigG's pooled text and six sizes as the vector.

    Without a negative prompt the unconditional text is zeros, or the empty text where the checkpoint's folder says so
    (`force_zeros_for_empty_prompt` is false); an empty one is encoded. Sizes: original height and width,
    crop top and left, target height and width, each a 256-wide sinusoid (Podell et al. 2023, Sec. 2.2).
    """
    told = {
        branch: text for branch, text in texts.items() if text is not None or not checkpoint.zero_negative
    }
    clip_l = run_encoder(checkpoint, "clip_l", [text or "" for text in told.values()], device, dtype)
    clip_g = run_encoder(checkpoint, "clip_g", [text or "" for text in told.values()], device, dtype)
    branches = {
        branch: (torch.cat([l, g], dim=2), pooled)
        for branch, (l, _), (g, pooled) in zip(told, clip_l, clip_g)
    }
    config, clip = checkpoint.config("denoiser"), checkpoint.config("clip_g")
    nothing = [
        torch.zeros(shape, device=device, dtype=dtype)
        for shape in ((1, clip.positions, config.context_width), (1, clip.projection))
    ]
    sizes = torch.tensor([height, width, 0, 0, height, width], device=device)
    sizes = (
        sinusoid(sizes, (config.vector_width - clip.projection) // len(sizes)).flatten()[None].to(dtype)
    )  # (1, 6 * 256)
    made = {branch: branches.get(branch, nothing) for branch in texts}
    return {
        branch: UNetConditioning(text, torch.cat([pooled, sizes], dim=1))
        for branch, (text, pooled) in made.items()
    }


def encode_sd3(checkpoint, texts, device, dtype, t5) -> dict[str, MMDiTConditioning]:
    """SD3: CLIP rows (CLIP-L and bigG side by side, padded with zeros to T5's width), then T5's rows; pooled of both CLIPs.

    Without a negative prompt the empty string is encoded. Without T5 its rows are zeros (Esser et al. 2024, Sec. 5.3.3).
    """
    names, texts = [*texts], [text or "" for text in texts.values()]
    clip_l = run_encoder(checkpoint, "clip_l", texts, device, dtype)
    clip_g = run_encoder(checkpoint, "clip_g", texts, device, dtype)
    context_width = checkpoint.config("denoiser").context_width
    if "t5" not in checkpoint.parts:
        text_t5s = [torch.zeros(1, checkpoint.t5_length, context_width, device=device, dtype=dtype)] * len(
            texts
        )
    else:
        place, precision = (torch.device("cpu"), torch.float32) if t5 == "cpu" else (device, dtype)
        stored = t5 == "fp8" or place.type == "cpu"
        text_t5s = [
            text.to(device) for text in run_encoder(checkpoint, "t5", texts, place, precision, stored)
        ]
    branches = []
    for (text_l, pooled_l), (text_g, pooled_g), text_t5 in zip(clip_l, clip_g, text_t5s):
        clip = torch.cat([text_l, text_g], dim=2)
        clip = F.pad(clip, (0, context_width - clip.shape[2]))
        text = torch.cat([clip, text_t5.to(dtype)], dim=1)  # (1, 77 + 256, 4096) in SD3-medium
        branches.append(MMDiTConditioning(text, torch.cat([pooled_l, pooled_g], dim=1)))
    return dict(zip(names, branches))
