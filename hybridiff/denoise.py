"""The denoising loop: performs a schedule, either one rank's list or, in one process, every rank's in turn."""

import time
from dataclasses import dataclass
from typing import Any, Iterator, NamedTuple, Sequence

import torch
from torch import Tensor

from hybridiff.clock import Bar, Clock
from hybridiff.guidance import discrepancy, guide
from hybridiff.samplers import Last, Sampler
from hybridiff.schedule import (
    DISCREPANCY,
    GUIDED,
    Extrapolate,
    Guide,
    Join,
    Measure,
    Operation,
    Receive,
    Run,
    Send,
    Step,
    Value,
    ahead,
    interleave,
    keys,
    prediction,
)
from hybridiff.strategies import Settings, Strategy
from hybridiff.switching import Stage, average_fall
from hybridiff.transport import Shapes, Transport


@dataclass(frozen=True)
class Task:
    """One picture: all that is fixed before its first step and the same on every rank."""

    denoiser: torch.nn.Module  # models.UNet or models.MMDiT
    cuts: tuple[Any, ...]  # where the denoiser is cut, as its class has it; see `Strategy.cuts`
    sampler: Sampler
    conditioning: dict[
        str, Any
    ]  # "cond", "uncond", as far as this process needs them -> UNetConditioning or MMDiTConditioning, batch 1
    guidance: float
    noise: Tensor  # (1, C, h, w), unit normal, fp32

    def batch(self, text: str) -> Any:
        """The conditioning of one text, or of "both" in one batch (uncond first)."""
        if text != "both":
            return self.conditioning[text]
        pairs = zip(self.conditioning["uncond"], self.conditioning["cond"])
        return type(self.conditioning["cond"])(*(None if a is None else torch.cat([a, b]) for a, b in pairs))

    def message(self, value: Value) -> Shapes:
        """Shapes and dtypes of the tensors that make up a value on its way."""
        if value == DISCREPANCY:
            return [(torch.Size(()), torch.float32)]
        net, latents = self.denoiser, self.noise.shape
        dtype = next(net.parameters()).dtype
        tokens = next(
            (told.text.shape[1] for told in self.conditioning.values()), 0
        )  # a rank that runs nothing has no text
        if value.of:
            of_keys, of_prediction = net.sizes(latents, tokens, value.at, value.of, value.block)
            shapes = [shape for shape in of_keys if shape] if value.what == "keys" else [of_prediction]
        elif value.what == "prediction":
            shapes = [latents]
        else:
            shapes = net.crossing(latents, tokens, self.cuts[value.at])[value.what == "inner"]
        return [(shape, dtype) for shape in shapes]

    def unpack(self, value: Value, tensors: Sequence[Tensor]) -> Any:
        """A value from its message's tensors."""
        if value.what in ("entry", "inner"):
            return self.denoiser.Boundary(*tensors)
        return self.denoiser.Keys(*tensors) if value.what == "keys" else tensors[0]

    def size(self, value: Value) -> int:
        """Bytes of a value on its way."""
        return sum(shape.numel() * dtype.itemsize for shape, dtype in self.message(value))


class Worker:
    """One rank's side of a picture: its latents, and its store of named values."""

    def __init__(self, rank: int, task: Task, transport: Transport):
        self.rank, self.task, self.transport = rank, task, transport
        self.latents = task.sampler.start(task.noise)
        self.last: Last = None
        self.store: dict[Value, Any] = {}
        self.older: dict[
            Value, Any
        ] = {}  # the result before the one in the store, of what may be extrapolated
        self.oldest: Tensor | None = None  # the guided prediction before that

    def keep(self, value: Value, result: Any) -> None:
        """Put a result into the store."""
        if value in self.store and value.what in ("prediction", "inner", "guided"):
            if value == GUIDED:
                self.oldest = self.older.get(value)
            self.older[value] = self.store[value]
        self.store[value] = result

    def extrapolate(self, value: Value, made: tuple[int, ...], i: int) -> Any:
        """The value at step i on the line through its last two results; see `schedule.Extrapolate`. Computed in fp32."""
        last, old = self.store[value], self.older[value]
        *before, a, b = made
        if before:
            missed = old + (b - a) / (a - before[0]) * (old - self.oldest) - last
            if missed.norm() > (last - old).norm():
                return last
        ratio = (i - b) / (b - a)
        if isinstance(last, Tensor):
            return (last.float() + ratio * (last.float() - old.float())).to(last.dtype)
        return type(last)(
            *((b.float() + ratio * (b.float() - a.float())).to(b.dtype) for a, b in zip(old, last))
        )

    def run(self, operation: Run, i: int) -> None:
        """Run a part of the network at step i and keep what it leaves; see `schedule.Run`."""
        task, net, text = self.task, self.task.denoiser, operation.text
        conditioning = task.batch(text)
        t = task.sampler.timesteps[i - operation.late, None].to(task.noise.device)
        given, cuts, at, of = self.store.get(operation.source), task.cuts, operation.at, operation.of
        kept = Value(
            "skips", text, at=0 if operation.part == "exit" else at
        )  # what stays here between two parts
        if operation.part in ("whole", "entry", "begin"):
            x = task.sampler.network_input(self.latents, i).to(conditioning.text.dtype)
        if operation.part == "whole" and text == "both":
            both = net(x.repeat(2, 1, 1, 1), t.repeat(2), conditioning)
            for name, half in zip(("uncond", "cond"), both.chunk(2)):
                self.keep(prediction(name), half)
            return
        match operation.part:
            case "whole":
                made = net(x, t, conditioning)
            case "entry":
                made, self.store[kept] = net.entry(x, t, conditioning, cuts[0])
            case "down":
                made, self.store[kept] = net.down(given, t, conditioning, cuts[at - 1], cuts[at])
            case "inner":
                made = net.inner(given, t, conditioning, cuts[at])
            case "up":
                made = net.up(given, self.store[kept], t, conditioning, cuts[at - 1], cuts[at])
            case "exit":
                made = net.exit(given, self.store[kept], t, conditioning, cuts[at])
            case "begin":
                made = net.begin(x, t, conditioning, at, of)
            case "keys":
                self.store[kept], made = net.keys(self.store[Value("slice", text)], operation.block)
            case "attend":
                every = [self.store.pop(keys(text, other, of, operation.block)) for other in range(1, of + 1)]
                made = net.attend(
                    self.store[Value("slice", text)], operation.block, self.store.pop(kept), every
                )
            case "end":
                made = net.end(self.store.pop(Value("slice", text)))
        self.keep(operation.leaves, made)

    def perform(self, operation: Operation, i: int) -> None:
        """Perform one operation of step i."""
        match operation:
            case Run():
                self.run(operation, i)
            case Send(value, to):
                content = self.store[value]
                tensors = (
                    (content,)
                    if isinstance(content, Tensor)
                    else tuple(tensor for tensor in content if tensor is not None)
                )
                self.transport.send(value, tensors, self.rank, to)
            case Receive(value, source):
                tensors = self.transport.receive(value, self.task.message(value), source, self.rank)
                self.keep(value, self.task.unpack(value, tensors))
            case Join(text, of):
                slices = [self.store.pop(prediction(text, at, of)) for at in range(1, of + 1)]
                self.keep(prediction(text), torch.cat(slices, dim=2))  # one below the other
            case Measure():
                self.store[DISCREPANCY] = discrepancy(
                    self.store[prediction("cond")], self.store[prediction("uncond")]
                )
            case Extrapolate(value, made):
                self.store[ahead(value)] = self.extrapolate(value, made, i)
            case Guide(cond, uncond):
                self.keep(
                    GUIDED, guide(self.store[cond].float(), self.store[uncond].float(), self.task.guidance)
                )
            case Step(along):
                now = self.latents, self.store[along].float()
                self.latents = self.task.sampler.step(*now, i, self.last)
                self.last = now


class StepRecord(NamedTuple):
    """What happened in one step, as far as this process saw it."""

    step: int
    stage: Stage
    discrepancy: float | None
    slope: float | None  # the average fall that the switch looks at
    seconds: float
    latents: Tensor  # (1, C, h, w) after the step, fp32
    bars: list[Bar]  # the operations of this process, in seconds from the start of the loop


@torch.inference_mode()
def denoise(task: Task, strategy: Strategy, settings: Settings, transport: Transport) -> Iterator[StepRecord]:
    """Make one picture's latents, step by step. The last record's latents are the result.

    With a `Mailbox` all ranks of the strategy are played here; with `Ranks` this process is one of them. Where the strategy is for one
    rank and there are more, each makes the whole picture.
    """
    here = range(strategy.ranks) if transport.world == 1 else [transport.rank]
    workers = {rank: Worker(rank, task, transport) for rank in here}
    history: list[float | None] = []  # discrepancies; those that decide are the same bits on every rank
    clock = Clock(task.noise.device)
    for i in range(settings.steps):
        start, transport.step = time.perf_counter(), i
        plan = strategy.plan(i, history, settings)
        lists = [(rank, plan.operations[rank % strategy.ranks]) for rank in here]
        for rank, operation in interleave(
            lists, lambda receive, rank: transport.arrived(receive.source, rank)
        ):
            begun, transport.doing = clock.mark(), operation
            workers[rank].perform(operation, i)
            clock.note(rank, i, operation, begun)
        first = workers[here[0]]
        transport.settle()
        measured = first.store.pop(DISCREPANCY, None)
        history.append(
            None if measured is None else float(measured)
        )  # the one scalar that the host waits for
        if task.noise.is_cuda:
            torch.cuda.synchronize()  # so that the seconds of pipelined steps are true
        seconds = time.perf_counter() - start
        slope = known_fall(i, history, settings)
        yield StepRecord(i, plan.stage, history[i], slope, seconds, first.latents, clock.take())


def known_fall(i: int, history: list[float | None], settings: Settings) -> float | None:
    """The average fall at step i, where the discrepancies at both ends of the window are known."""
    window = settings.rule.window
    known = i >= window and history[i] is not None and history[i - window + 1] is not None
    return average_fall(history, i, window) if known else None
