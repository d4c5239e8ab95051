"""The Python interface: make pictures from a script or a notebook, with one process or under torchrun.

from hybridiff import open_checkpoint, sample

checkpoint = open_checkpoint("demo-sdxl")
picture = sample(checkpoint, "a small green star", preset="balanced", seed=3)
if picture.image is not None:  # on rank 0
    Image.fromarray(picture.image.numpy()).save("picture.png")
"""

import atexit
import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from hybridiff.denoise import StepRecord
from hybridiff.distributed.transport import AnyTransport, connect, place
from hybridiff.errors import UsageError, printable
from hybridiff.pipeline import Result, generate, plan_picture
from hybridiff.request import make_request
from weights.load import Checkpoint


def sample(
    checkpoint: Checkpoint,
    prompt: str | None = None,
    *,
    device: str | torch.device | None = None,
    on_step: Callable[[StepRecord], Any] = lambda record: None,
    **arguments: Any,
) -> Result:
    """One picture; under torchrun every rank must call it with the same arguments, and all ranks make it together.

    `arguments` are those of `hybridiff.request.make_request`, with the command line's defaults: negative_prompt, preset, strategy, steps,
    guidance, height, width, seed, sampler and more. `on_step` is called after every step. Returns the image, uint8 (H, W, 3) on the CPU
    (None on ranks other than 0), the records of the steps, the paper's switch, seconds and bytes. UsageError, a ValueError, names an argument
    that cannot be had. Several calls share one connection between the ranks, which ends with the process.
    """
    device = choose_device(None if device is None else str(device))
    transport = session(device)
    request = make_request(checkpoint, prompt, device=device, **arguments)
    request = replace(request, seed=transport.all_gather(request.seed)[0])
    plan = plan_picture(checkpoint, request, transport.world)
    return generate(checkpoint, plan, transport, device, on_step)


@functools.cache
def session(device: torch.device) -> AnyTransport:
    """The connection of this process to the other ranks, made once."""
    transport = connect()
    transport.locate(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    transport.open_channels(device)

    def end() -> None:
        if not hasattr(sys, "last_value"):  # after an error the other ranks see this one end
            transport.shutdown()

    atexit.register(end)
    return transport


def choose_device(name: str | None) -> torch.device:
    """The device asked for; by default this rank's share of the GPUs, or the CPU."""
    gpus = torch.cuda.device_count()
    if name in (None, "cuda"):
        if name == "cuda" and not gpus:
            raise UsageError("`device` cuda: there is no CUDA device here; use `device` cpu.")
        return torch.device("cuda", place()[2] % gpus) if gpus else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
    except (RuntimeError, AssertionError):
        raise UsageError(f"`device` {printable(name)} is not there: use cpu or cuda.") from None
    return device
