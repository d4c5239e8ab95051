"""What a schedule costs, before anything is run: its timeline from the cost of each part, as data and as text."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from hybridiff.clock import Bar
from hybridiff.denoise import Task, Worker
from hybridiff.schedule import (
    Attend,
    Computation,
    Extrapolate,
    Name,
    Operation,
    Project,
    Receive,
    Run,
    Send,
    StepPlan,
    bytes_sent,
    interleave,
    keys,
)
from hybridiff.strategies import Settings, Strategy
from hybridiff.switching import MIDDLE
from hybridiff.transport import Mailbox
from models.tape import Shard

ZOOM = 6  # steps of the middle stage that are drawn in detail, with those around them

Costs = dict[
    object, float
]  # `work` of a computation -> cost for one branch, in evaluations of the whole network


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
    parts += {run.work: run for run in shards}.values()  # one shard after the other
    worker, counted = Worker(0, task, Mailbox()), {}
    for run in parts:
        for index in range(run.shard.count if isinstance(run, Attend) else 0):
            name = keys(run.branch, run.unit, Shard(index, run.shard.count))
            worker.keep(name, [torch.empty(s, dtype=d, device=meta) for s, d in task.message(name)])
        with FlopCounterMode(display=False) as counter:
            worker.compute(run, 0)
        counted[run.work] = counter.get_total_flops()
    return {work: operations / counted[whole.work] for work, operations in counted.items()}


@torch.inference_mode()
def unit_times(task: Task, repeats: int = 5) -> list[float]:
    """Seconds of every unit of the network on this device: the median of some runs, after one that does not count."""
    net, conditioning = task.denoiser, next(iter(task.conditioning.values()))
    t, size = task.sampler.timesteps[0, None].to(task.noise.device), task.noise.shape[2:]
    seconds = []
    for _ in range(repeats + 1):
        x, kept = task.sampler.network_input(task.noise, 0).to(conditioning.text.dtype), {}
        seconds.append([])
        for unit in range(net.units):
            start = now(task.noise.device)
            x = net.run((unit, unit + 1), x, kept, t, conditioning, size)
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
    bars = []
    for step, plan in enumerate(plans):
        sent: dict[tuple[int, int], list[float]] = {}  # (sender, receiver) -> when each message arrives
        for rank, operation in interleave(
            list(enumerate(plan.operations)), lambda r, to: bool(sent.get((r.source, to)))
        ):
            start = clock[rank]
            if isinstance(operation, Computation):
                clock[rank] += costs[operation.work] * (2 if operation.branch == "both" else 1)
                bars.append(Bar(rank, step, start, clock[rank], "run", str(operation)))
            elif isinstance(operation, Send):
                lane = rank, operation.to
                free[lane] = max(start, free.get(lane, 0.0)) + delay(operation.name)
                sent.setdefault(lane, []).append(free[lane])
                bars.append(Bar(rank, step, start, start, "send", str(operation)))
            elif isinstance(operation, Receive):
                clock[rank] = max(start, sent[operation.source, rank].pop(0))
                bars.append(Bar(rank, step, start, clock[rank], "wait", str(operation)))
    return bars


def length(bars: Sequence[Bar]) -> float:
    """Cost from start to end; serial sampling costs two a step."""
    return max(bar.end for bar in bars)


def draw(bars: Sequence[Bar], ranks: int, columns_per_unit: int = 16) -> str:
    """The bars as text: two rows a rank, a column a sixteenth of a network evaluation.

    Above, # computes, | begins a part, . waits; below, where its messages leave (>) and are taken (<), or both (x).
    """
    first = min(bar.start for bar in bars)
    width = round((length(bars) - first) * columns_per_unit) + 1
    work, mail = ([[" "] * width for _ in range(ranks)] for _ in range(2))
    for bar in bars:
        begin, end = (round((at - first) * columns_per_unit) for at in (bar.start, bar.end))
        if bar.what == "run":
            work[bar.rank][begin:end] = "#" * (end - begin)
            if end > begin and begin:
                work[bar.rank][begin] = "|"
        else:
            work[bar.rank][begin:end] = "." * (end - begin)
            mark = "<" if bar.what == "wait" else ">"
            mail[bar.rank][end] = mark if mail[bar.rank][end] in (" ", mark) else "x"
    lines = []
    for rank in range(ranks):
        lines.append(f"  rank {rank}  {''.join(work[rank]).rstrip()}")
        if any(mark != " " for mark in mail[rank]):
            lines.append(f"          {''.join(mail[rank]).rstrip()}")
    return "\n".join(lines)


def total_bytes(plans: Sequence[StepPlan], task: Task) -> Counter[str]:
    """Bytes of all messages by kind, from the schedule alone: what the transport will count, to the byte."""
    return sum((bytes_sent(plan, task.size) for plan in plans), Counter())


def detail(middle: Sequence[int]) -> tuple[int, int]:
    """First and last step to draw in detail, given the steps of the middle stage: with the step before it and at most ZOOM after its first."""
    return middle[0] - 1, min(middle[-1], middle[0] + ZOOM) + 1


def explain(name: str, strategy: Strategy, settings: Settings, task: Task) -> str:
    """Every kind of step as a table of operations, a timeline around the switch, the ideal speed-up and the bytes."""
    plans = plan_all(strategy, settings)
    costs = part_costs(task, strategy, plans)
    bars = timeline(plans, costs)
    drawn = ", drawn for a switch by the cap" if name == "paper" else ""
    ranks = f"{strategy.ranks} ranks" if strategy.ranks > 1 else "1 rank"
    pieces = [f"{name}: {settings.steps} steps on {ranks}{drawn}"]
    if len(strategy.partition.spans) > 1:
        shares = (f"{a}-{b - 1} {costs[a, b]:.0%}" for a, b in strategy.partition.spans)
        pieces.append(
            f"units of the network, with shares of its floating-point operations: {', '.join(shares)}"
        )
    pieces += tables(plans)
    first, last = detail([step for step, plan in enumerate(plans) if plan.stage in MIDDLE] or [1])
    shown = [bar for bar in bars if first <= bar.step <= last]
    pieces.append(
        f"\ntimeline of steps {shown[0].step} to {shown[-1].step} (# computes, | begins a part, . waits; below, > sends, < receives, x both)"
    )
    pieces.append(draw(shown, strategy.ranks))
    cost, sent = length(bars), total_bytes(plans, task)
    pieces.append(
        f"\nideal cost {cost:.1f} network evaluations, serial {2 * len(plans)}: speed-up {2 * len(plans) / cost:.2f}"
    )
    pieces += [idle] if (idle := idle_ranks(strategy, settings)) else []
    pieces.append(
        f"bytes sent: {sent.total():,} ({', '.join(f'{kind} {count:,}' for kind, count in sent.items())})"
    )
    return "\n".join(pieces)


def tables(plans: Sequence[StepPlan]) -> list[str]:
    """Every kind of step as a table of operations, and in a line each stretch of steps that is of a kind told before."""
    pieces: list[str] = []
    told: dict[
        object, tuple[str, StepPlan]
    ] = {}  # kind, whatever steps are extrapolated from -> the first steps of it
    starts = [step for step, plan in enumerate(plans) if step == 0 or plan != plans[step - 1]]
    for start, end in zip(starts, [*starts[1:], len(plans)]):
        plan, span = plans[start], f"step {start}" if end - start == 1 else f"steps {start} to {end - 1}"
        kind = tuple(
            tuple(op.name if isinstance(op, Extrapolate) else op for op in operations)
            for operations in plan.operations
        )
        if kind in told:
            where, like = told[kind]
            lines = dict.fromkeys(
                str(op) for operations in plan.operations for op in operations if isinstance(op, Extrapolate)
            )
            other = f", but {', '.join(lines)}" if plan.operations != like.operations else ""
            between = "\n" if pieces[-1].count("\n") > 1 else ""  # after a table
            pieces.append(f"{between}{span}, {plan.stage}: as {where}{other}")
        else:
            told[kind] = span, plan
            pieces.append(f"\n{span}, {plan.stage}\n{table(plan)}")
    return pieces


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


def table(plan: StepPlan) -> str:
    """The operations of every rank, a column each, two columns beside each other."""
    lists = [[f"rank {rank}", *shortened(operations)] for rank, operations in enumerate(plan.operations)]
    pieces = []
    for columns in (lists[rank : rank + 2] for rank in range(0, len(lists), 2)):
        rows = max(map(len, columns))
        cells = [column + [""] * (rows - len(column)) for column in columns]
        widths = [max(map(len, column)) for column in cells]
        pieces.append(
            "\n".join(
                "  " + "   ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in zip(*cells)
            )
        )
    return "\n\n".join(pieces)


def shortened(operations: Sequence[Operation]) -> list[str]:
    """Operations in words; those of all units but the first, which are alike, in one line."""
    units = [unit_of(operation) for operation in operations]
    words = [
        str(operation) if unit == 0 else f"the same for units 1 to {max(units)}"
        for operation, unit in zip(operations, units)
    ]
    return list(dict.fromkeys(words)) if any(units) else words


def unit_of(operation: Operation) -> int:
    """The unit of a computation or a message on shards; 0 for everything else."""
    if isinstance(operation, (Project, Attend)):
        return operation.unit
    keys_sent = isinstance(operation, (Send, Receive)) and operation.name.what == "keys"
    return operation.name.at if keys_sent else 0


def runs_of(strategy: Strategy, settings: Settings, rank: int) -> list[Computation]:
    """All that a rank may have to run of the network, whenever the switch comes: as early as it can, by the slope, or by the cap."""
    level = [1.0] * settings.steps
    early = [strategy.plan(step, level[:step], settings) for step in range(settings.steps)]
    return list(
        dict.fromkeys(run for plan in [*early, *plan_all(strategy, settings)] for run in plan.runs(rank))
    )
