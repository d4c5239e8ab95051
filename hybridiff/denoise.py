"""The denoising loop: performs a schedule, either one rank's list or, in one process, every rank's in turn."""

import time
from dataclasses import dataclass
from typing import Any, Iterator, NamedTuple

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
    Measure,
    Operation,
    Receive,
    Run,
    Send,
    Step,
    Value,
    ahead,
    entry,
    inner,
    interleave,
    prediction,
)
from hybridiff.strategies import Settings, Strategy
from hybridiff.switching import Stage, average_fall
from hybridiff.transport import Shapes, Transport


@dataclass(frozen=True)
class Task:
    """One picture: all that is fixed before its first step and the same on every rank."""

    denoiser: torch.nn.Module  # models.UNet or models.MMDiT
    cut: Any  # where the denoiser is cut, as its class has it
    sampler: Sampler
    conditioning: dict[str, Any]  # "cond", "uncond", as far as this process needs them -> UNetConditioning or MMDiTConditioning, batch 1
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
        text = next(iter(self.conditioning.values())).text  # (1, L, context width), in the network's dtype
        if value == DISCREPANCY:
            return [(torch.Size(()), torch.float32)]
        if value.what == "prediction":
            return [(self.noise.shape, text.dtype)]
        leaves_entry, leaves_inner = self.denoiser.crossing(self.noise.shape, text.shape[1], self.cut)
        return [(shape, text.dtype) for shape in (leaves_entry if value.what == "entry" else leaves_inner)]


class Worker:
    """One rank's side of a picture: its latents, and its store of named values."""

    def __init__(self, rank: int, task: Task, transport: Transport):
        self.rank, self.task, self.transport = rank, task, transport
        self.latents = task.sampler.start(task.noise)
        self.last: Last = None
        self.store: dict[Value, Any] = {}
        self.older: dict[Value, Any] = {}  # the result before the one in the store, of what may be extrapolated

    def keep(self, value: Value, result: Any) -> None:
        """Put a result into the store."""
        if value in self.store and value.what in ("prediction", "inner", "guided"):
            self.older[value] = self.store[value]
        self.store[value] = result

    def extrapolate(self, value: Value, made: tuple[int, ...], i: int) -> Any:
        """The value at step i on the line through its last two results; see `schedule.Extrapolate`. Computed in fp32."""
        last = self.store[value]
        if len(made) == 1:
            return last
        old, ratio = self.older[value], (i - made[1]) / (made[1] - made[0])
        if isinstance(last, Tensor):
            return (last.float() + ratio * (last.float() - old.float())).to(last.dtype)
        return type(last)(*((b.float() + ratio * (b.float() - a.float())).to(b.dtype) for a, b in zip(old, last)))

    def run(self, operation: Run, i: int) -> None:
        """Run a part of the network at step i and keep what it leaves; see `schedule.Run`."""
        task, net, text = self.task, self.task.denoiser, operation.text
        conditioning = task.batch(text)
        t = task.sampler.timesteps[i - operation.late, None].to(task.noise.device)
        if operation.part in ("whole", "entry"):
            x = task.sampler.network_input(self.latents, i).to(conditioning.text.dtype)
        if operation.part == "whole" and text == "both":
            both = net(x.repeat(2, 1, 1, 1), t.repeat(2), conditioning)
            for name, half in zip(("uncond", "cond"), both.chunk(2)):
                self.keep(prediction(name), half)
        elif operation.part == "whole":
            self.keep(prediction(text), net(x, t, conditioning))
        elif operation.part == "entry":
            self.store[entry(text)], self.store[Value("skips", text)] = net.entry(x, t, conditioning, task.cut)
        elif operation.part == "inner":
            self.keep(inner(text), net.inner(self.store[operation.source], t, conditioning, task.cut))
        else:
            features, skips = self.store[operation.source], self.store[Value("skips", text)]
            self.keep(prediction(text), net.exit(features, skips, t, conditioning, task.cut))

    def perform(self, operation: Operation, i: int) -> None:
        """Perform one operation of step i."""
        match operation:
            case Run():
                self.run(operation, i)
            case Send(value, to):
                content = self.store[value]
                self.transport.send(value, (content,) if isinstance(content, Tensor) else content, self.rank, to)
            case Receive(value, source):
                tensors = self.transport.receive(value, self.task.message(value), source, self.rank)
                crossed = value.what in ("entry", "inner")
                self.keep(value, self.task.denoiser.Boundary(*tensors) if crossed else tensors[0])
            case Measure():
                self.store[DISCREPANCY] = discrepancy(self.store[prediction("cond")], self.store[prediction("uncond")])
            case Extrapolate(value, made):
                self.store[ahead(value)] = self.extrapolate(value, made, i)
            case Guide(cond, uncond):
                self.keep(GUIDED, guide(self.store[cond].float(), self.store[uncond].float(), self.task.guidance))
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
        for rank, operation in interleave(lists, lambda receive, rank: transport.arrived(receive.source, rank)):
            begun, transport.doing = clock.mark(), operation
            workers[rank].perform(operation, i)
            clock.note(rank, i, operation, begun)
        first = workers[here[0]]
        measured = first.store.pop(DISCREPANCY, None)
        history.append(None if measured is None else float(measured))  # the one scalar that the host waits for
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
