"""What a run needs before it begins, against the memory that is free.

Needs are counted too low rather than too high (weights, and the largest features), so that nothing is refused that would fit; weights
that are used in the dtype of the file, on the CPU, need no memory of their own.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from hybridiff.errors import UsageError
from hybridiff.request import Request
from hybridiff.tiles import LARGE
from weights.files import FLOATS
from weights.load import Checkpoint

FEATURES = 12  # feature maps of the denoiser's first width that live at once, at least (tests/app/test_memory.py counts them)
TILE = 96 + 18  # latents along a side of a tile with its border, see hybridiff/tiles.py


def free_host() -> int | None:
    """Bytes that this process may still get: of the machine, swap included, and of its control group. None where that cannot be read."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        sizes = [sum(int(fields[name].split()[0]) * 1024 for name in ("MemAvailable", "SwapFree"))]
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except (OSError, KeyError, ValueError):
        return None
    for _, kinds, path in groups:
        for folder in (path.lstrip("/"), ""):  # within a container its own group is the root
            home = Path("/sys/fs/cgroup", "memory" if kinds else "", folder)
            names = (
                ("memory.limit_in_bytes", "memory.usage_in_bytes")
                if kinds
                else ("memory.max", "memory.current")
            )
            try:
                limit, used = (int((home / name).read_text()) for name in names)
                cache = dict(line.split() for line in (home / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such group, or no limit ("max")
                continue
            sizes.append(limit - used + int(cache.get("active_file", 0)) + int(cache.get("inactive_file", 0)))
    return min(sizes)


def weight_bytes(
    checkpoint: Checkpoint, part: str, dtype: torch.dtype, mapped: bool, prefix: str = ""
) -> int:
    """Bytes of a part's weights in a dtype; `mapped`: without those that the file holds in it, which stay there."""
    fitted, total = checkpoint.part(part), 0
    for name, tensor in fitted.module.state_dict().items():
        if name.startswith(prefix) and (source := fitted.sources.get(name)):
            if not (mapped and all(FLOATS[fitted.entries[key].dtype] == dtype for key in source.keys)):
                total += tensor.numel() * dtype.itemsize
    return total


class Place(NamedTuple):
    """Where the networks run, and how many of them are there at once."""

    cuda: bool
    ranks: int  # share the host's memory
    sharing: int  # of these share a GPU's
    kept: bool  # networks stay for the next pictures


def demands(checkpoint: Checkpoint, request: Request, where: Place) -> Iterator[tuple[str, int, int]]:
    """What each phase needs at least, in words, and its bytes of host memory and of GPU memory."""
    cuda, held = where.cuda, (0, 0)

    def needed(
        weights: int,
        more: int = 0,
        on_gpu: bool = cuda,
        ranks: int = where.ranks,
        sharing: int = where.sharing,
        of: int = 1,
    ) -> tuple[int, int]:
        """Bytes on (host, GPU) with what is held from the phases before; where networks are kept, these weights are from now on, by one rank `of` so many."""
        nonlocal held
        host, gpu = held
        if where.kept:
            held = (
                (host, gpu + weights * (sharing // of)) if on_gpu else (host + weights * (ranks // of), gpu)
            )
        return (host, gpu + (weights + more) * sharing) if on_gpu else (host + (weights + more) * ranks, gpu)

    precision = str(request.dtype).removeprefix("torch.")
    no_text = checkpoint.zero_negative and request.negative_prompt is None  # for ranks without the prompt
    of = 2 if no_text and where.ranks > 1 else 1
    for part in checkpoint.text_encoders:
        dtype, on_gpu = request.dtype, cuda
        if part == "t5" and (request.t5 != "device" or not cuda):  # it stays as it is stored
            on_gpu, dtype = cuda and request.t5 == "fp8", checkpoint.dtype("t5")
        weights = weight_bytes(checkpoint, part, dtype, not on_gpu)
        words = f"text encoder {part} in {str(dtype).removeprefix('torch.')}"
        yield words, *needed(weights, on_gpu=on_gpu, of=of)
    vae = checkpoint.config("vae")
    latents = checkpoint.model.latents((request.height, request.width), vae)
    height, width = latents[-2:]
    features = checkpoint.part("denoiser").module.shapes(1, latents, 0)[0].numel()
    weights = weight_bytes(checkpoint, "denoiser", request.dtype, not cuda)
    yield (
        f"the denoiser in {precision} at {request.width} x {request.height}",
        *needed(weights, FEATURES * features * request.dtype.itemsize),
    )
    # bytes of the widest features at the full size, in fp32
    pixel = 4 * vae.channels * max(vae.multipliers[:2])
    weights = weight_bytes(checkpoint, "vae", torch.float32, not cuda, "decoder.")
    pixels, words = request.height * request.width, f"the decoder at {request.width} x {request.height}"
    if not (request.tiles and pixels > LARGE):  # one picture, on one rank
        yield words, *needed(weights, 3 * pixels * pixel, ranks=1, sharing=1)
    else:
        host, gpu = needed(
            weights, 3 * min(height, TILE) * min(width, TILE) * vae.factor**2 * pixel, ranks=1, sharing=1
        )
        yield f"{words} in tiles", host + pixels * pixel, gpu


def fits(checkpoint: Checkpoint, request: Request, where: Place, free: tuple[int, int]) -> bool:
    """Whether no phase plainly needs more than the bytes of (host, GPU) memory that are free."""
    return all(host <= free[0] and gpu <= free[1] for _, host, gpu in demands(checkpoint, request, where))


def advice(checkpoint: Checkpoint, request: Request, where: Place, free: tuple[int, int]) -> list[str]:
    """What would make it fit, each by itself."""
    tries = {"--tiles": {"tiles": True}}
    tries |= {
        f"--dtype {str(dtype).removeprefix('torch.')}": {"dtype": dtype}
        for dtype in (torch.bfloat16, torch.float16)
        if dtype != request.dtype
    }
    if "t5" in checkpoint.parts:
        tries |= {"--t5 cpu": {"t5": "cpu"}} if where.cuda else {}
        tries |= {"--t5 fp8": {"t5": "fp8"}} if checkpoint.dtype("t5").itemsize == 1 else {}
    tries["a smaller --height and --width"] = {"height": request.height // 4, "width": request.width // 4}
    good = [
        name for name, change in tries.items() if fits(checkpoint, replace(request, **change), where, free)
    ]
    if "t5" in checkpoint.parts and not good:
        t5 = checkpoint.checked.pop("t5")
        good += ["--no-t5"] if fits(checkpoint, request, where, free) else []
        checkpoint.checked = checkpoint.checked | {"t5": t5}
    if where.kept and fits(checkpoint, request, where._replace(kept=False), free):
        good.append("one picture a run")
    if not good and where.ranks > 1 and fits(checkpoint, request, where._replace(ranks=1, sharing=1), free):
        good.append("one process alone")
    return good


def refuse_too_large(
    checkpoint: Checkpoint,
    request: Request,
    device: torch.device,
    ranks: int,
    replica_size: int,
    kept: bool,
    sharing: int = 1,
) -> None:
    """UsageError, with the figures and what would help, where a phase plainly needs more memory than is free.

    `ranks`: on this machine; `sharing`: of these, on this rank's GPU. `replica_size`: ranks that make a picture together. `kept`: more pictures follow, which all replicas make, and for which the networks stay loaded.
    """
    cuda = device.type == "cuda"
    if not kept:
        ranks = min(ranks, replica_size)
    sharing = min(sharing, ranks) if cuda else 1
    if (
        not checkpoint.part("denoiser").module.shardable
        and request.strategy != "one-branch"
        and not request.balance
    ):
        ranks = max(1, ranks * min(replica_size, 2) // replica_size)  # spare ranks hold little or nothing
        sharing = min(sharing, ranks)
    host = free_host()
    if host is None:
        return
    free = host, torch.cuda.mem_get_info(device)[0] if cuda else 0
    where_all = Place(cuda, ranks, sharing, kept)
    for words, *needed in demands(checkpoint, request, where_all):
        for need, there, where in zip(needed, free, ("memory", f"memory of {device}")):
            if need > there:
                on = f" on {ranks} ranks" if ranks > 1 and not words.startswith("the decoder") else ""
                helps = (
                    " or ".join(advice(checkpoint, request, where_all, free)) or "a machine with more of it"
                )
                raise UsageError(
                    f"{words}{on} needs at least {need / 1e9:,.1f} GB of {where}, and {there / 1e9:,.1f} GB are free: try {helps}."
                )
