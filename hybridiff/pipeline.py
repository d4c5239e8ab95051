"""Prompt -> conditioning -> latents -> image, with the seconds of each phase."""

import math
import time
from dataclasses import dataclass, replace
from typing import Callable, Sequence

import torch
from torch import Tensor

from hybridiff.clock import Bar
from hybridiff.denoise import StepRecord, Task, denoise
from hybridiff.errors import SharedError, UsageError, remedy, require_finite
from hybridiff.memory import MemoryWatch
from hybridiff.samplers import Sampler, make_sampler
from hybridiff.schedule import Computation
from hybridiff.partition import weights_needed
from hybridiff.strategies import STRATEGIES, Reuse, Settings, Strategy
from hybridiff.switching import SwitchRule
from hybridiff.text import encode, meta_encode
from hybridiff.tiles import LARGE, decode_tiled
from hybridiff.timeline import idle_ranks, runs_of, unit_times
from hybridiff.transport import Transport
from weights.files import FP8
from weights.load import Checkpoint, WeightsError

LARGEST = 2**16  # pixels a side
WORTH_SPLITTING = 2**18  # pixels from which the ranks decode together
OVERLAP = 18  # latents that neighbouring tiles share


@dataclass(frozen=True)
class Request:
    """One picture as asked for, every default filled in. Sizes in pixels."""

    prompt: str
    negative_prompt: str | None
    steps: int
    guidance: float
    height: int
    width: int
    seed: int
    sampler: str | None
    strategy: str
    rule: SwitchRule
    dtype: torch.dtype
    tiles: bool = False  # decode in tiles if the picture is large
    reuse: Reuse = Reuse()  # which steps our strategies save
    t5: str | None = "device"  # where and how T5 runs: "device", "cpu" or "fp8"; None where there is none
    balance: bool = False  # cut where the measured times of the parts say


@dataclass(frozen=True)
class Result:
    """The image and what happened on the way."""

    image: Tensor | None  # (height, width, 3) uint8 on the CPU; may be None on ranks other than 0
    records: list[StepRecord]
    seconds: dict[
        str, list[float]
    ]  # by phase, of every rank; "waiting" is that for the others before the first step and after decoding
    bytes_sent: dict[str, int]  # by kind of value, over all ranks
    bars: list[Bar]  # every operation of every rank as measured, in seconds from the start of the first step
    memory: list[dict]  # of every rank, see memory.MemoryWatch.told
    use: dict  # how the ranks are used: "cuts", "weights" (bytes of the denoiser that each holds), "idle" (a sentence, or None), and "seconds_of_units"


def check_size(checkpoint: Checkpoint, height: int, width: int) -> None:
    """UsageError unless the networks can make a picture of this size."""
    denoiser, factor = checkpoint.config("denoiser"), checkpoint.config("vae").factor
    multiple = denoiser.multiple * factor
    largest = getattr(denoiser, "largest", None)
    for name, side in (("height", height), ("width", width)):
        if side < multiple or side % multiple:
            raise UsageError(
                f"--{name} {side} does not fit this network: give a positive multiple of {multiple}."
            )
        if largest is not None and side > largest * factor:
            raise UsageError(
                f"--{name} {side} is beyond this network's positions: give at most {largest * factor}."
            )
        if side > LARGEST:
            raise UsageError(f"--{name} {side} is too large: give at most {LARGEST}.")


def plan_request(checkpoint: Checkpoint, request: Request, world: int | None) -> tuple[Strategy, Sampler]:
    """The strategy and the sampler of a request for `world` ranks; UsageError in whatever cannot be done. Reads no tensors."""
    if request.strategy not in STRATEGIES:
        raise UsageError(f"--strategy {request.strategy} is unknown: choose one of {', '.join(STRATEGIES)}.")
    strategy = STRATEGIES[request.strategy]
    if request.strategy == "one-branch" and request.guidance > 1:
        raise UsageError(
            f"--strategy one-branch leaves guidance out: give --guidance 1 with it, not {request.guidance:g}."
        )
    config, denoiser = checkpoint.config("denoiser"), checkpoint.part("denoiser").module
    counts = strategy.counts(denoiser)
    if world in counts:
        strategy = strategy.on(denoiser, world)
    elif world not in (None, 1) and request.strategy != "one-branch":
        possible = f"1 process{f' or {in_words(counts)} ranks' if counts != [1] else ''}{' with this network' if strategy.many else ''}"
        raise UsageError(
            f"--strategy {request.strategy} runs on {possible}, not on {world}: set --nproc_per_node so."
        )
    else:
        try:
            strategy = strategy.on(denoiser)
        except ValueError as error:
            raise UsageError(f"--strategy {request.strategy} does not fit this network: {error}.") from None
    if request.balance and request.strategy == "one-branch":
        raise UsageError(
            f"--balance has nothing to balance where guidance {request.guidance:g} is none: leave it out, or give more --guidance."
        )
    if request.balance and (request.strategy != "paper" or world == 1):
        raise UsageError(
            "--balance chooses where paper cuts the network for several ranks: add --strategy paper and start them by torchrun, or leave it out."
        )
    rule = request.rule
    if not math.isfinite(rule.slope):
        raise UsageError(f"--slope {rule.slope} is not a finite number: give one, such as 4e-4.")
    for name, value, least in (
        ("window", rule.window, 2),
        ("slope", rule.slope, 0),
        ("cap", rule.cap, 1),
        ("interval", rule.interval, 0),
    ):
        if value < least:
            raise UsageError(f"--{name} {value} is out of range: give at least {least}.")
    for name, value, least in (("full-first", request.reuse.start, 2), ("reused", request.reuse.count, 0)):
        if value < least:
            raise UsageError(f"--{name} {value} is out of range: give at least {least}.")
    if request.t5 in ("cpu", "fp8") and "t5" not in checkpoint.parts:
        raise UsageError(f"--t5 {request.t5} says how T5 runs, and there is no T5 here: leave it out.")
    if request.t5 == "fp8" and checkpoint.dtype("t5") not in FP8:
        raise UsageError(
            "--t5 fp8 needs a T5 that is stored in fp8, and this one is not: leave it out or give --t5 cpu."
        )
    if not math.isfinite(request.guidance):
        raise UsageError(f"--guidance {request.guidance} is not a finite number: give one, such as 5.")
    check_size(checkpoint, request.height, request.width)
    if strategy.ranks > 2 and denoiser.shardable:
        rows = request.height // (config.multiple * checkpoint.config("vae").factor)
        if rows < strategy.ranks // 2:
            raise UsageError(
                f"--height {request.height} is {rows} rows of patches, too few for {strategy.ranks} ranks: take fewer ranks."
            )
    shift = checkpoint.defaults.get("shift", 3.0)  # what the folder's scheduler says
    return strategy, make_sampler(checkpoint.model.prediction, request.sampler, request.steps, shift)


def latent_shape(checkpoint: Checkpoint, request: Request) -> torch.Size:
    """Shape of the latents of a request, (1, C, h, w)."""
    return checkpoint.model.latents((request.height, request.width), checkpoint.config("vae"))


def draw_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Unit normal latents, fp32, drawn on the CPU: the same on every rank and device."""
    return torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed))


def in_words(numbers: Sequence[int]) -> str:
    """2, 4 or 6."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


def meta_task(checkpoint: Checkpoint, request: Request, world: int = 1) -> Task:
    """The task of a request on the meta device: shapes and dtypes of everything, no weights read, nothing computed."""
    conditioning = meta_encode(checkpoint, request.height, request.width, request.dtype)
    noise = torch.empty(latent_shape(checkpoint, request), device="meta")
    denoiser = checkpoint.part("denoiser").module.to(request.dtype)
    sampler = plan_request(checkpoint, request, world)[1]
    return Task(denoiser, sampler, conditioning, request.guidance, noise)


@torch.inference_mode()
def decode(
    checkpoint: Checkpoint,
    latents: Tensor,
    device: torch.device,
    tiles: bool = False,
    transport: Transport | None = None,
) -> Tensor:
    """Latents as the denoiser leaves them -> image (height, width, 3) uint8. In fp32: SDXL's decoder overflows in fp16.

    With `tiles`, large pictures go through the decoder in pieces. With a `transport`, every rank of the team decodes some rows.
    """
    problem = None
    try:
        vae = checkpoint.load("vae", torch.float32, device, decoder_only=True)
    except WeightsError as error:
        if transport is None:
            raise
        problem = str(error)
    if transport:
        agree(transport, problem)
    raw = vae.unscale(latents.to(device, torch.float32))
    height, width = raw.shape[2:]
    tile = (96, 96) if tiles and height * width * vae.config.factor**2 > LARGE else (height, width)
    if transport:
        rows = min(tile[0], -(-height // transport.world) + OVERLAP)
        image = decode_tiled(
            vae, raw, (rows, tile[1]), OVERLAP, transport.rank, transport.world, transport.gather_tensor
        )[0]
    else:
        image = (vae.decode(raw) if tile == (height, width) else decode_tiled(vae, raw, tile, OVERLAP))[0]
    other = "take a file with another autoencoder"
    require_finite(image, "decoder", "image", lambda: remedy(checkpoint, "vae", torch.float32, other))
    return (
        ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu()
    )  # (C, H, W) -> (H, W, C)


def decoded_together(request: Request, ranks: int) -> bool:
    """Whether the ranks share the rows of a picture: where it is large, and need not be exactly the picture of one device."""
    exact = request.strategy in ("serial", "batched", "condition", "one-branch")
    return ranks > 1 and not exact and request.height * request.width >= WORTH_SPLITTING


def runs_here(strategy: Strategy, settings: Settings, transport: Transport) -> list[Computation]:
    """All parts of the network that the ranks of this process may ever run."""
    here = range(strategy.ranks) if transport.world == 1 else [transport.rank % strategy.ranks]
    return [run for rank in here for run in runs_of(strategy, settings, rank)]


def branches_of(runs: Sequence[Computation]) -> list[str]:
    """The branches ("cond", "uncond") of these runs: each rank encodes only its own text."""
    found = {run.branch for run in runs}
    return [branch for branch in ("cond", "uncond") if branch in found or "both" in found]


def agree(transport: Transport, problem: str | None) -> None:
    """SharedError on every rank of the team if one of them has a problem."""
    for told in transport.gather(problem):
        if told is not None:
            raise SharedError(told)


def generate(
    checkpoint: Checkpoint,
    request: Request,
    transport: Transport,
    device: torch.device,
    on_step: Callable[[StepRecord], None] = lambda record: None,
) -> Result:
    """Make one picture. Every rank of the team calls it with the same request; rank 0 has the image in the end.

    It decodes alone where the picture is small or must be exact, else the ranks share the rows.
    """
    strategy, sampler = plan_request(checkpoint, request, transport.world)
    seconds: dict[str, float] = {}
    memory = MemoryWatch(device)

    def clock(phase: str, start: float) -> float:
        now = time.perf_counter()
        seconds[phase] = seconds.get(phase, 0.0) + now - start
        memory.note(phase)
        return now

    now, transport.doing, transport.step = time.perf_counter(), "text", -1
    size = (request.height, request.width)
    settings = Settings(request.steps, request.rule, request.reuse)
    runs, problem = runs_here(strategy, settings, transport), None
    # --balance times a rank that will run nothing too
    branches = branches_of(runs) or (["cond"] if request.balance else [])

    def names_held(runs: Sequence[Computation]) -> tuple[str, ...] | None:
        """How the names of the denoiser's parameters begin that this process needs; None for all."""
        return None if transport.world == 1 else weights_needed(checkpoint.part("denoiser").module, runs)

    try:
        conditioning = encode(
            checkpoint,
            request.prompt,
            request.negative_prompt,
            *size,
            device,
            request.dtype,
            request.t5,
            branches,
        )
        now, transport.doing = clock("text", now), "load"
        held = None if request.balance else names_held(runs)
        denoiser = checkpoint.load("denoiser", request.dtype, device, names=held)
        now = clock("load", now)
    except (UsageError, WeightsError) as error:
        problem = str(error)
    agree(transport, problem)  # the ranks begin together, so that their clocks agree
    now = clock("waiting", now)

    times = None
    noise = draw_noise(latent_shape(checkpoint, request), request.seed).to(device)
    task = Task(denoiser, sampler, conditioning, request.guidance, noise)
    if request.balance:
        times = transport.gather(unit_times(task))
        strategy = strategy.on(denoiser, strategy.ranks, times)  # all ranks have the same times
        held = names_held(runs_here(strategy, settings, transport))
        if held is not None:
            denoiser, task = (
                None,
                replace(task, denoiser=None),
            )  # the whole network goes before a part of it comes
            denoiser = checkpoint.load("denoiser", request.dtype, device, names=held)
        task = replace(task, denoiser=denoiser)
        clock("balance", now)
    weights = sum(p.numel() * p.element_size() for p in denoiser.state_dict().values() if not p.is_meta)
    told = transport.gather(weights)
    use = {
        "cuts": list(strategy.partition.spans),
        "seconds_of_units": times,
        "weights": told,
        "idle": idle_ranks(strategy, settings),
    }
    records = []
    for record in denoise(task, strategy, settings, transport):
        records.append(record)
        seconds[record.stage] = seconds.get(record.stage, 0.0) + record.seconds
        memory.note(record.stage)
        on_step(record)
    bytes_sent = transport.finish()
    bars = [
        Bar(*bar)
        for told in transport.gather([bar for record in records for bar in record.bars])
        for bar in told
    ]
    del task, denoiser
    problem = None

    def advice() -> str:
        return remedy(checkpoint, "denoiser", request.dtype, "try a smaller --guidance")

    try:
        for record in records:
            where = f"denoiser, step {record.step} ({record.stage})"
            require_finite(record.latents, where, "latents", advice)
    except (UsageError, WeightsError) as error:
        problem = str(error)
    agree(transport, problem)

    now, transport.doing, transport.step = time.perf_counter(), "decode", -1
    split = decoded_together(request, transport.world)
    image = None
    try:
        if split or transport.rank == 0:
            image = decode(
                checkpoint, records[-1].latents, device, request.tiles, transport if split else None
            )
    except (UsageError, WeightsError) as error:
        problem = str(error)
    now = clock("decode", now)
    agree(transport, problem)
    clock("waiting", now)
    spent, memories = zip(*transport.gather((seconds, memory.told())))
    phases = {phase: [of_rank.get(phase, 0.0) for of_rank in spent] for phase in seconds}
    return Result(image, records, phases, dict(bytes_sent), bars, list(memories), use)
