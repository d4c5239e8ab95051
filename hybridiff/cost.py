"""What a schedule costs, before anything is run: floating-point operations, its timeline, bytes, and which parts each rank runs."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hybridiff.denoise import Task, Worker
from hybridiff.distributed.local import LocalTransport
from hybridiff.schedule import (
    Attend,
    Computation,
    Name,
    Receive,
    Run,
    Send,
    StepPlan,
    interleave,
    keys,
)
from hybridiff.strategies import Settings, Strategy
from hybridiff.switching import MIDDLE
from models.tape import Features, Shard


class Bar(NamedTuple):
    """A stretch of one rank's time."""

    rank: int
    step: int
    start: float
    end: float
    what: str  # "run", "send", "wait" (a receive) or "other" (measure, guide, step)
    label: str  # the operation


# `work_of` a computation -> cost for one branch, in evaluations of the whole network
Costs = dict[object, float]


def work_of(computation: Computation) -> object:
    """What is computed, whatever the branch."""
    if isinstance(computation, Run):
        return computation.span
    return type(computation), computation.unit, computation.shard


@torch.inference_mode()
def part_costs(task: Task, strategy: Strategy, plans: Sequence[StepPlan] = ()) -> Costs:
    """Share of the network's floating-point operations in each of the strategy's spans, and in the shards that the plans run.

    Counted on the meta device, where the denoiser must be: nothing is computed.
    """
    meta, conditioning = torch.device("meta"), next(iter(task.conditioning.values()))
    conditioning = type(conditioning)(*(None if t is None else t.to(meta) for t in conditioning))
    task = replace(
        task, noise=task.noise.to(meta), conditioning={"cond": conditioning, "uncond": conditioning}
    )
    whole, spans = strategy.partition.whole("cond"), strategy.partition.spans
    parts: list[Computation] = [whole, *(strategy.partition.run(span, "cond") for span in spans)]
    shards = [run for plan in plans for run in plan.runs() if not isinstance(run, Run)]
    parts += {work_of(run): run for run in shards}.values()  # one shard after the other
    worker, counted = Worker(0, task, LocalTransport()), {}
    for run in parts:
        if isinstance(run, Attend):
            for index in range(run.shard.count):
                name = keys(run.branch, run.unit, Shard(index, run.shard.count))
                worker.keep(name, [torch.empty(s, dtype=d, device=meta) for s, d in task.message(name)])
        with FlopCounterMode(display=False) as counter:
            worker.compute(run, 0)
        counted[work_of(run)] = counter.get_total_flops()
    return {work: operations / counted[work_of(whole)] for work, operations in counted.items()}


@torch.inference_mode()
def unit_times(task: Task, repeats: int = 5) -> list[float]:
    """Seconds of every unit of the network on this device: the median of some runs, after one that does not count."""
    net, conditioning = task.denoiser, next(iter(task.conditioning.values()))
    t, (height, width) = task.sampler.timesteps[0, None].to(task.noise.device), task.noise.shape[2:]
    x: Features
    kept: dict[int, Tensor]
    seconds: list[list[float]] = []
    for _ in range(repeats + 1):
        x, kept = task.sampler.scale_input(task.noise, 0).to(conditioning.text.dtype), {}
        seconds.append([])
        for unit in range(net.units):
            start = now(task.noise.device)
            x = net.run((unit, unit + 1), x, kept, t, conditioning, (height, width))
            seconds[-1].append(now(task.noise.device) - start)
    return [median(times) for times in zip(*seconds[1:])]


def now(device: torch.device) -> float:
    """Seconds, once a CUDA device has finished what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def plan_all(strategy: Strategy, settings: Settings) -> list[StepPlan]:
    """The plans of all steps, as if the discrepancy never fell slowly enough: the switch comes by the cap."""
    rising = [1.0 + step for step in range(settings.steps)]
    return [strategy.plan(step, rising[:step], settings) for step in range(settings.steps)]


def timeline(
    plans: Sequence[StepPlan], costs: Costs, delay: Callable[[Name], float] = lambda name: 0.0
) -> list[Bar]:
    """Every rank's bars, if everything but the network and the messages took no time. A receive waits for its message.

    A message takes `delay(name)`, in the unit of the costs, one after the other in each direction between two ranks.
    """
    clock = [0.0] * len(plans[0].operations)
    free: dict[tuple[int, int], float] = {}  # (sender, receiver) -> when the last message has arrived
    sent: dict[tuple[int, int], list[float]] = {}  # (sender, receiver) -> when messages on their way arrive
    bars = []

    def arrived(receive: Receive, rank: int) -> bool:
        return bool(sent.get((receive.source, rank)))

    for step, plan in enumerate(plans):
        for rank, operation in interleave(list(enumerate(plan.operations)), arrived):
            start = clock[rank]
            if isinstance(operation, Computation):
                clock[rank] += costs[work_of(operation)] * (2 if operation.branch == "both" else 1)
                bars.append(Bar(rank, step, start, clock[rank], "run", str(operation)))
            elif isinstance(operation, Send):
                channel = rank, operation.to
                free[channel] = max(start, free.get(channel, 0.0)) + delay(operation.name)
                sent.setdefault(channel, []).append(free[channel])
                bars.append(Bar(rank, step, start, start, "send", str(operation)))
            elif isinstance(operation, Receive):
                clock[rank] = max(start, sent[operation.source, rank].pop(0))
                bars.append(Bar(rank, step, start, clock[rank], "wait", str(operation)))
    return bars


def length(bars: Sequence[Bar]) -> float:
    """Cost from start to end; serial sampling costs two a step."""
    return max(bar.end for bar in bars)


def total_bytes(plans: Sequence[StepPlan], task: Task) -> Counter[str]:
    """Bytes of all messages by kind, from the schedule alone: what the transport will count, to the byte."""
    return sum((bytes_sent(plan, task.size) for plan in plans), Counter())


def idle_ranks(strategy: Strategy, settings: Settings) -> str | None:
    """A sentence on ranks that have nothing to run in the full steps, if there are any."""
    plans = plan_all(strategy, settings)
    full = [plan for plan in plans if plan.stage not in MIDDLE] or plans
    idle = [rank for rank in range(strategy.ranks) if not any(plan.runs(rank) for plan in full)]
    if not idle:
        return None
    when = (
        "outside of the middle stage"
        if any(plan.runs(rank) for plan in plans for rank in idle)
        else "all the time"
    )
    return f"idle {when}: rank{'s' * (len(idle) > 1)} {', '.join(map(str, idle))} (this network cannot be divided within a branch)"


def runs_of(strategy: Strategy, settings: Settings, rank: int) -> list[Computation]:
    """All that a rank may have to run of the network, whenever the switch comes: as early as it can, by the slope, or by the cap."""
    level = [1.0] * settings.steps
    early = [strategy.plan(step, level[:step], settings) for step in range(settings.steps)]
    return list(
        dict.fromkeys(run for plan in [*early, *plan_all(strategy, settings)] for run in plan.runs(rank))
    )


def bytes_sent(plan: StepPlan, size: Callable[[Name], int]) -> Counter[str]:
    """Bytes of a step's messages by kind ("prediction", "features", ...), given the bytes of a result."""
    total: Counter[str] = Counter()
    for operations in plan.operations:
        for operation in operations:
            if isinstance(operation, Send):
                total[operation.name.what] += size(operation.name)
    return total
