"""The denoising loop: performs a schedule, either one rank's list or, in one process, every rank's in turn."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridiff.distributed.local import Shapes
from hybridiff.distributed.transport import AnyTransport
from hybridiff.guidance import discrepancy, guide
from hybridiff.samplers import Previous, Sampler
from hybridiff.schedule import (
    DISCREPANCY,
    GUIDED,
    Attend,
    Computation,
    Extrapolate,
    Guide,
    Join,
    Measure,
    Name,
    Operation,
    Project,
    Receive,
    Run,
    Send,
    Step,
    extrapolated,
    features,
    interleave,
    keys,
    prediction,
)
from hybridiff.strategies import Settings, Strategy
from hybridiff.switching import Stage, Switch, average_fall
from hybridiff.watch import Watch
from models.tape import Denoiser, Shard


@dataclass(frozen=True)
class Task:
    """One picture: all that is fixed before its first step and the same on every rank."""

    denoiser: Denoiser
    sampler: Sampler
    # "cond", "uncond", if this process needs them -> the network's conditioning, batch 1
    conditioning: dict[str, Any]
    guidance: float
    noise: Tensor  # (1, C, h, w), unit normal, fp32

    def batch(self, branch: str) -> Any:
        """The conditioning of one branch, or of "both" in one batch (uncond first)."""
        if branch != "both":
            return self.conditioning[branch]
        pairs = zip(self.conditioning["uncond"], self.conditioning["cond"])
        return type(self.conditioning["cond"])(*(None if a is None else torch.cat([a, b]) for a, b in pairs))

    def message(self, name: Name) -> Shapes:
        """Shapes and dtypes of the tensors of a result when it is sent."""
        if name == DISCREPANCY:
            return [(torch.Size(()), torch.float32)]
        net, latents = self.denoiser, self.noise.shape
        # a rank that runs nothing has no text
        tokens = next((conditioning.text.shape[1] for conditioning in self.conditioning.values()), 0)
        if name.what == "keys" and name.shard:
            shapes = net.key_shapes(name.at, latents, tokens, name.shard)
        else:
            at = net.units if name.what == "prediction" else name.at
            shapes = net.shapes(at, latents, tokens, name.shard)
        dtype = next(net.parameters()).dtype
        return [(shape, dtype) for shape in shapes]

    def size(self, name: Name) -> int:
        """Bytes of a result when it is sent."""
        return sum(shape.numel() * dtype.itemsize for shape, dtype in self.message(name))


def tensors_of(result: Tensor | Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The tensors that a result consists of."""
    return (result,) if isinstance(result, Tensor) else tuple(t for t in result if t is not None)


class Worker:
    """One rank's side of a picture: its latents, and its store of named results."""

    def __init__(self, rank: int, task: Task, transport: AnyTransport):
        self.rank, self.task, self.transport = rank, task, transport
        self.latents = task.sampler.scale_noise(task.noise)
        self.previous: Previous = None
        self.store: dict[Name, Any] = {}
        self.older: dict[Name, Any] = {}  # of what may be extrapolated, the value before the one in the store
        self.oldest: Tensor | None = None  # the guided prediction before that
        self.kept: dict[str, dict[int, Tensor]] = {}  # branch -> what its units left for later units

    def keep(self, name: Name, result: Any) -> None:
        """Put a result into the store."""
        if name in self.store and name.what in ("prediction", "features", "guided") and not name.shard:
            if name == GUIDED:
                self.oldest = self.older.get(name)
            self.older[name] = self.store[name]
        self.store[name] = result

    def extrapolate(self, name: Name, steps: tuple[int, ...], i: int) -> Any:
        """A result at step i on the line through its last two values; see `schedule.Extrapolate`. Computed in fp32."""
        last, old = self.store[name], self.older[name]
        *before, a, b = steps
        if before:
            missed = old + (b - a) / (a - before[0]) * (old - self.oldest) - last
            if missed.norm() > (last - old).norm():
                return last
        ratio = (i - b) / (b - a)
        pairs = zip(tensors_of(old), tensors_of(last))
        line = tuple((y.float() + ratio * (y.float() - x.float())).to(y.dtype) for x, y in pairs)
        return line[0] if isinstance(last, Tensor) else line

    def compute(self, operation: Computation, i: int) -> None:
        """Run a part of the network at step i and keep its output; see `schedule.Run`, `Project`, `Attend`."""
        task, net, branch = self.task, self.task.denoiser, operation.branch
        conditioning, (height, width) = task.batch(branch), task.noise.shape[2:]
        size = height, width
        late = operation.late if isinstance(operation, Run) else 0
        t = task.sampler.timesteps[i - late, None].to(task.noise.device)

        def latents() -> Tensor:
            return task.sampler.scale_input(self.latents, i).to(conditioning.text.dtype)

        match operation:
            case Run(span, "both"):
                x = latents().repeat(2, 1, 1, 1)
                (both,) = tensors_of(net.run(span, x, {}, t.repeat(2), conditioning, size))
                for name, half in zip(("uncond", "cond"), both.chunk(2)):
                    self.keep(prediction(name), half)
                return
            case Run(span, _, _, source):
                x, kept = self.store[source] if source else latents(), self.kept.setdefault(branch, {})
                result = net.run(span, x, kept, t, conditioning, size)
            case Project(_, unit, shard):
                x = self.store.pop(features(branch, unit, shard)) if unit else latents()
                self.store[Name("state", branch)], result = net.project(unit, x, t, conditioning, size, shard)
            case Attend(_, unit, shard):
                shards = [Shard(index, shard.count) for index in range(shard.count)]
                gathered = [self.store.pop(keys(branch, unit, each)) for each in shards]
                result = net.attend(unit, self.store.pop(Name("state", branch)), gathered, size)
        self.keep(operation.output, result)

    def perform(self, operation: Operation, i: int) -> None:
        """Perform one operation of step i."""
        match operation:
            case Run() | Project() | Attend():
                self.compute(operation, i)
            case Send(name, to):
                self.transport.send(name, tensors_of(self.store[name]), self.rank, to)
            case Receive(name, source):
                tensors = self.transport.receive(name, self.task.message(name), source, self.rank)
                self.keep(name, tensors[0] if len(tensors) == 1 else tensors)
            case Join(branch, count):
                rows = [self.store.pop(prediction(branch, Shard(index, count))) for index in range(count)]
                self.keep(prediction(branch), torch.cat(rows, dim=2))  # one below the other
            case Measure():
                self.store[DISCREPANCY] = discrepancy(
                    self.store[prediction("cond")], self.store[prediction("uncond")]
                )
            case Extrapolate(name, steps):
                self.store[extrapolated(name)] = self.extrapolate(name, steps, i)
            case Guide(cond, uncond):
                self.keep(
                    GUIDED, guide(self.store[cond].float(), self.store[uncond].float(), self.task.guidance)
                )
            case Step(along):
                now = self.latents, self.store[along].float()
                self.latents = self.task.sampler.step(*now, i, self.previous)
                self.previous = now


class StepRecord(NamedTuple):
    """What happened in one step, as far as this process saw it."""

    step: int
    stage: Stage
    discrepancy: float | None
    slope: float | None  # the average fall that the switch looks at
    seconds: float
    latents: Tensor  # (1, C, h, w) after the step, fp32
    switch: Switch | None = None  # the paper's, once it is decided


@torch.inference_mode()
def denoise(
    task: Task, strategy: Strategy, settings: Settings, transport: AnyTransport, watch: Watch | None = None
) -> Iterator[StepRecord]:
    """Make one picture's latents, step by step. The last record's latents are the result.

    With a `LocalTransport` all ranks of the strategy are played here; with a `TorchTransport` this process is one of them. Where the
    strategy is for one rank and there are more, each makes the whole picture.
    """
    here = range(strategy.ranks) if transport.world == 1 else [transport.rank]
    workers = {rank: Worker(rank, task, transport) for rank in here}
    history: list[float | None] = []  # discrepancies; those that decide are the same bits on every rank
    watch = watch or Watch()
    watch.begin()

    def arrived(receive: Receive, rank: int) -> bool:
        return transport.arrived(receive.source, rank)

    for i in range(settings.steps):
        start, transport.step = time.perf_counter(), i
        plan = strategy.plan(i, history, settings)
        lists = [(rank, plan.operations[rank % strategy.ranks]) for rank in here]
        for rank, operation in interleave(lists, arrived):
            begun, transport.doing = watch.mark(), operation
            workers[rank].perform(operation, i)
            watch.note(rank, i, operation, begun)
        first = workers[here[0]]
        transport.synchronize()
        measured = first.store.pop(DISCREPANCY, None)
        # the one scalar that the host waits for
        history.append(None if measured is None else float(measured))
        if task.noise.is_cuda:
            torch.cuda.synchronize()  # so that the seconds of pipelined steps are true
        seconds = time.perf_counter() - start
        slope = average_fall(history, i, settings.rule.window)
        yield StepRecord(i, plan.stage, history[i], slope, seconds, first.latents, plan.switch)
