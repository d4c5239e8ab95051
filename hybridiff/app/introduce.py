"""The first lines of output: with what the pictures are made, and what was noticed while loading and reading the prompts."""

from collections.abc import Iterable, Iterator

import torch

from hybridiff.app.console import log
from hybridiff.app.demo_words import remarks_on
from hybridiff.app.prepare import Order
from hybridiff.app.prompts import read_prompts
from hybridiff.distributed.transport import Transport
from hybridiff.errors import printable
from hybridiff.request import check_text
from hybridiff.text import cuts
from weights.load import Checkpoint

# a picture's name (may be empty), its prompt, its negative prompt
Texts = Iterable[tuple[str, str, str | None]]


def set_up(transport: Transport, order: Order) -> None:
    """Ready this process for its device, and connect it to its replica."""
    if order.device.type == "cpu":
        torch.set_num_threads(order.args.threads)
    else:
        torch.cuda.set_device(order.device)
    transport.open_channels(order.device, order.args.transport)


def introduce(transport: Transport, order: Order, plan: str, prompt: str = "") -> None:
    """Say with what the pictures are made."""
    args, checkpoint = order.args, order.checkpoint
    log(
        f"{checkpoint.family} from {printable(args.weights)}, {plan}, {order.device.type}{transport.route}{prompt}"
    )
    for remark in checkpoint.remarks:
        log(remark)
    names = ("prompt", "negative_prompt")
    texts = (entry.get(name, getattr(args, name)) for entry in order.entries for name in names)
    for remark in remarks_on(texts, checkpoint.defaults.get("prompt")):
        log(remark)


def log_cuts(checkpoint: Checkpoint, texts: Texts) -> None:
    """Say what the text encoders leave out; equal cuts share a line."""
    named: dict[str, list[str]] = {}
    for name, prompt, negative_prompt in texts:
        for sentence in cuts(checkpoint, prompt, negative_prompt):
            named.setdefault(sentence, []).append(name)
    for sentence, (first, *others) in named.items():
        names = ", ".join([first, *others[:2]]) + (f" and {len(others) - 2} more" if others[2:] else "")
        log(f"{names}: {sentence}" if names else sentence)


def texts_to_check(order: Order) -> Iterator[tuple[str, str, str | None]]:
    """The prompts that --check is given, as for `log_cuts`."""
    args = order.args
    entries = [{"prompt": prompt} for prompt in args.prompt or ()]
    entries += read_prompts(args.prompts) if args.prompts else []
    for number, entry in enumerate(entries or [{"prompt": ""}], 1):
        texts = entry["prompt"], entry.get("negative_prompt", args.negative_prompt)
        for name, text in zip(("--prompt", "--negative-prompt"), texts):
            check_text(name, text)
        yield f"prompt {number}" if len(entries) > 1 else "", *texts
