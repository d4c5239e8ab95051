"""Prompt -> conditioning -> latents -> image, with the seconds of each phase."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hybridiff.cost import Bar, idle_ranks, runs_of, unit_times
from hybridiff.denoise import StepRecord, Task, denoise
from hybridiff.distributed.transport import AnyTransport
from hybridiff.errors import UsageError, raise_together, remedy, require_finite
from hybridiff.partition import weights_needed
from hybridiff.request import Request
from hybridiff.samplers import Sampler, make_sampler
from hybridiff.schedule import Computation
from hybridiff.strategies import STRATEGIES, Settings, Strategy
from hybridiff.switching import Switch
from hybridiff.text import encode, meta_encode
from hybridiff.tiles import LARGE, decode_tiled
from hybridiff.watch import Watch
from models.tape import Denoiser
from weights.load import Checkpoint

WORTH_SPLITTING = 2**18  # pixels from which the ranks decode together
OVERLAP = 18  # latents that neighbouring tiles share


class Plan(NamedTuple):
    """How a picture is made: its request, and what that comes to on a number of ranks."""

    request: Request
    strategy: Strategy
    sampler: Sampler
    settings: Settings


@dataclass(frozen=True)
class Result:
    """The image and what happened on the way."""

    image: Tensor | None  # (height, width, 3) uint8 on the CPU; may be None on ranks other than 0
    records: list[StepRecord]
    switch: Switch | None  # of `paper`, where it came
    # by phase, of every rank; "waiting" is that for the others before the first step and after decoding
    seconds: dict[str, list[float]]
    bytes_sent: dict[str, int]  # by kind of result, over all ranks
    bars: list[Bar]  # every operation of every rank as measured, in seconds from the start of the first step
    memory: list[dict]  # of every rank, see `hybridiff.app.profile.Profile`
    # how the ranks are used: "cuts" (spans), "weights" (bytes of the denoiser that each holds), "idle" (a sentence, or None), "seconds_of_units"
    use: dict


def plan_picture(checkpoint: Checkpoint, request: Request, ranks: int | None) -> Plan:
    """The plan of a request for so many ranks, or for as many as its strategy is written for (None). Reads no tensors.

    UsageError in whatever the network or the number of ranks does not allow.
    """
    denoiser, strategy = checkpoint.part("denoiser").module, STRATEGIES[request.strategy]
    counts = strategy.counts(denoiser)
    if ranks not in (None, 1, *counts) and request.strategy != "one-branch":
        possible = f"1 process{f' or {in_words(counts)} ranks' if counts != [1] else ''}{' with this network' if strategy.many else ''}"
        raise UsageError(
            f"`strategy` {request.strategy} runs on {possible}, not on {ranks}: start as many with torchrun."
        )
    try:
        strategy = strategy.on(denoiser, ranks if ranks in counts else None)
    except ValueError as error:
        raise UsageError(f"`strategy` {request.strategy} does not fit this network: {error}.") from None
    if request.balance and (request.strategy != "paper" or ranks == 1):
        raise UsageError(
            "`balance` chooses where paper cuts the network for several ranks: add `strategy` paper and start them by torchrun, or leave it out."
        )
    if strategy.ranks > 2 and denoiser.shardable:
        rows = request.height // (denoiser.config.multiple * checkpoint.config("vae").factor)
        if rows < strategy.ranks // 2:
            raise UsageError(
                f"`height` {request.height} is {rows} rows of patches, too few for {strategy.ranks} ranks: take fewer ranks."
            )
    shift = checkpoint.defaults.get("shift", 3.0)  # what the folder's scheduler says
    sampler = make_sampler(checkpoint.model.prediction, request.sampler, request.steps, shift)
    return Plan(request, strategy, sampler, Settings(request.steps, request.rule, request.reuse))


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


def meta_task(checkpoint: Checkpoint, plan: Plan) -> Task:
    """The task of a plan on the meta device: shapes and dtypes of everything, no weights read, nothing computed."""
    request = plan.request
    conditioning = meta_encode(checkpoint, request.height, request.width, request.dtype)
    noise = torch.empty(latent_shape(checkpoint, request), device="meta")
    denoiser = checkpoint.part("denoiser").module.to(request.dtype)
    return Task(denoiser, plan.sampler, conditioning, request.guidance, noise)


@torch.inference_mode()
def decode(
    checkpoint: Checkpoint,
    latents: Tensor,
    device: torch.device,
    tiles: bool = False,
    transport: AnyTransport | None = None,
) -> Tensor:
    """Latents as the denoiser leaves them -> image (height, width, 3) uint8. In fp32: SDXL's decoder overflows in fp16.

    With `tiles`, large pictures go through the decoder in pieces. With a `transport`, every rank of the replica decodes some rows.
    """
    with raise_together(transport.all_gather) if transport else nullcontext():
        vae = checkpoint.load("vae", torch.float32, device, decoder_only=True)
    raw = vae.unscale(latents.to(device, torch.float32))
    height, width = raw.shape[2:]
    tile = (96, 96) if tiles and height * width * vae.config.factor**2 > LARGE else (height, width)
    if transport:
        rows = min(tile[0], -(-height // transport.world) + OVERLAP)
        image = decode_tiled(
            vae, raw, (rows, tile[1]), OVERLAP, transport.rank, transport.world, transport.all_gather_tensor
        )[0]
    else:
        image = (vae.decode(raw) if tile == (height, width) else decode_tiled(vae, raw, tile, OVERLAP))[0]
    other = "take a file with another autoencoder"
    require_finite(image, "decoder", "image", lambda: remedy(checkpoint, "vae", torch.float32, other))
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(1, 2, 0).cpu()  # (C, H, W) -> (H, W, C)


def decoded_together(request: Request, ranks: int) -> bool:
    """Whether the ranks share the rows of a picture: where it is large, and need not be exactly the picture of one device."""
    exact = request.strategy in ("serial", "batched", "condition", "one-branch")
    return ranks > 1 and not exact and request.height * request.width >= WORTH_SPLITTING


def runs_here(plan: Plan, transport: AnyTransport) -> list[Computation]:
    """All parts of the network that the ranks of this process may ever run."""
    ranks = plan.strategy.ranks
    here = range(ranks) if transport.world == 1 else [transport.rank % ranks]
    return [run for rank in here for run in runs_of(plan.strategy, plan.settings, rank)]


def branches_of(runs: Sequence[Computation]) -> list[str]:
    """The branches ("cond", "uncond") of these runs: each rank encodes only its own text."""
    found = {run.branch for run in runs}
    return [branch for branch in ("cond", "uncond") if branch in found or "both" in found]


class Phases:
    """Seconds by phase. A phase goes on until `end` names it."""

    def __init__(self, watch: Watch):
        self.watch, self.since = watch, time.perf_counter()
        self.seconds: dict[str, float] = {}

    def end(self, name: str) -> None:
        """What was done since the last phase belongs to this one."""
        now = time.perf_counter()
        self.add(name, now - self.since)
        self.since = now

    def add(self, name: str, seconds: float) -> None:
        """So many seconds more of a phase, which ends now."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.watch.phase(name)


def generate(
    checkpoint: Checkpoint,
    plan: Plan,
    transport: AnyTransport,
    device: torch.device,
    on_step: Callable[[StepRecord], None] = lambda record: None,
    watch: Watch | None = None,
) -> Result:
    """Make one picture. Every rank of the replica calls it with the same plan; rank 0 has the image in the end.

    It decodes alone where the picture is small or must be exact, else the ranks share the rows.
    """
    watch = watch or Watch()
    phases = Phases(watch)
    with raise_together(transport.all_gather):  # the ranks begin together, so that their clocks agree
        task = prepare_task(checkpoint, plan, transport, device, phases)
    phases.end("waiting")
    times = None
    if plan.request.balance:
        times = transport.all_gather(unit_times(task))
        plan, task = balance(checkpoint, plan, task, times, transport, device)
        phases.end("balance")
    use = use_of(plan, task, times, transport)

    records = []
    for record in denoise(task, plan.strategy, plan.settings, transport, watch):
        records.append(record)
        phases.add(record.stage, record.seconds)
        on_step(record)
    bytes_sent = transport.flush()
    bars = [Bar(*bar) for own in transport.all_gather(watch.bars()) for bar in own]
    del task
    with raise_together(transport.all_gather):
        require_finite_latents(checkpoint, plan.request, records)

    phases.since, transport.doing, transport.step = time.perf_counter(), "decode", -1
    with raise_together(transport.all_gather):
        image = decode_result(checkpoint, plan.request, records[-1].latents, transport, device)
        phases.end("decode")
    phases.end("waiting")
    spent, memory = zip(*transport.all_gather((phases.seconds, watch.memory())))
    seconds = {phase: [of_rank.get(phase, 0.0) for of_rank in spent] for phase in phases.seconds}
    switch = next((record.switch for record in records if record.stage == "parallelism"), None)
    return Result(image, records, switch, seconds, dict(bytes_sent), bars, list(memory), use)


def prepare_task(
    checkpoint: Checkpoint, plan: Plan, transport: AnyTransport, device: torch.device, phases: Phases
) -> Task:
    """Encode this process's texts, load the weights that it needs (all, where units are to be timed), draw the noise."""
    request, runs = plan.request, runs_here(plan, transport)
    transport.doing, transport.step = "text", -1
    # `balance` times a rank that will run nothing too
    branches = branches_of(runs) or (["cond"] if request.balance else [])
    texts = request.prompt, request.negative_prompt
    size = request.height, request.width
    conditioning = encode(checkpoint, *texts, *size, device, request.dtype, request.t5, branches)
    phases.end("text")
    transport.doing = "load"
    denoiser = load_denoiser(checkpoint, plan, transport, device, everything=request.balance)
    phases.end("load")
    noise = draw_noise(latent_shape(checkpoint, request), request.seed).to(device)
    return Task(denoiser, plan.sampler, conditioning, request.guidance, noise)


def load_denoiser(
    checkpoint: Checkpoint,
    plan: Plan,
    transport: AnyTransport,
    device: torch.device,
    everything: bool = False,
) -> Denoiser:
    """The denoiser with the weights that this process needs, the others on the meta device."""
    names = None
    if transport.world > 1 and not everything:
        names = weights_needed(checkpoint.part("denoiser").module, runs_here(plan, transport))
    return checkpoint.load("denoiser", plan.request.dtype, device, names=names)


def balance(
    checkpoint: Checkpoint, plan: Plan, task: Task, times: list, transport: AnyTransport, device: torch.device
) -> tuple[Plan, Task]:
    """Cut anew by the measured times of all ranks, which all of them have; each keeps the weights that it needs."""
    strategy = plan.strategy.on(task.denoiser, plan.strategy.ranks, times)
    plan = plan._replace(strategy=strategy)
    task = replace(task, denoiser=None)  # type: ignore[arg-type]  # the whole network goes before a part of it comes
    return plan, replace(task, denoiser=load_denoiser(checkpoint, plan, transport, device))


def use_of(plan: Plan, task: Task, times: list | None, transport: AnyTransport) -> dict:
    """How the ranks are used, see `Result.use`."""
    held = (p for p in task.denoiser.state_dict().values() if not p.is_meta)
    weights = transport.all_gather(sum(p.numel() * p.element_size() for p in held))
    idle = idle_ranks(plan.strategy, plan.settings)
    spans = list(plan.strategy.partition.spans)
    return {"cuts": spans, "seconds_of_units": times, "weights": weights, "idle": idle}


def require_finite_latents(checkpoint: Checkpoint, request: Request, records: Sequence[StepRecord]) -> None:
    """UsageError that names the first step whose latents hold NaN or infinity."""
    for record in records:
        where = f"denoiser, step {record.step} ({record.stage})"
        require_finite(
            record.latents,
            where,
            "latents",
            lambda: remedy(checkpoint, "denoiser", request.dtype, "try a smaller `guidance`"),
        )


def decode_result(
    checkpoint: Checkpoint, request: Request, latents: Tensor, transport: AnyTransport, device: torch.device
) -> Tensor | None:
    """The image of the last latents, by all ranks together or by rank 0 alone."""
    if decoded_together(request, transport.world):
        return decode(checkpoint, latents, device, request.tiles, transport)
    return decode(checkpoint, latents, device, request.tiles) if transport.rank == 0 else None
