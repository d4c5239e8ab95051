"""What a schedule costs, before anything is run: its timeline from the cost of each part, as data and as text."""

import time
from collections import Counter
from dataclasses import replace
from statistics import median
from typing import Mapping, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from hybridiff.clock import Bar
from hybridiff.denoise import Task, Worker
from hybridiff.schedule import (
    Extrapolate,
    Operation,
    Receive,
    Run,
    Send,
    StepPlan,
    Value,
    bytes_sent,
    entry,
    inner,
    interleave,
    keys,
)
from hybridiff.segments import in_segments
from hybridiff.strategies import Settings, Strategy
from hybridiff.transport import Mailbox

ZOOM = 6  # steps of the middle stage that are drawn in detail, with those around them

Costs = dict[str, float]  # unit of a Run -> cost of one run under one text, in units of the whole network


def part_costs(task: Task, plans: Sequence[StepPlan] = ()) -> Costs:
    """Share of the floating-point operations that falls to each part, counted on the meta device (nothing is computed).

    Of "whole", "entry", "inner" and "exit" at the only cut, and of whatever else is run in `plans`. The denoiser is on the meta device.
    """
    meta, told = torch.device("meta"), next(iter(task.conditioning.values()))
    told = type(told)(*(None if tensor is None else tensor.to(meta) for tensor in told))
    task = replace(task, noise=task.noise.to(meta), conditioning={"cond": told, "uncond": told})
    parts = [
        Run("whole", "cond"),
        Run("entry", "cond"),
        Run("inner", "cond", entry("cond")),
        Run("exit", "cond", inner("cond")),
    ]
    parts += [run for plan in plans for run in plan.runs() if run.text != "both"]
    counted: dict[object, int] = {}  # kind of part -> operations
    costs: Costs = {}
    for unit, run in {run.unit: run for run in parts}.items():
        kind = (run.part, run.at, run.of, task.denoiser.kind(run.block)) if run.of else unit
        counted[kind] = counted.get(kind) or count(task, run)
        costs[unit] = counted[kind] / counted["whole"]
    return costs


@torch.inference_mode()
def count(task: Task, run: Run) -> int:
    """Floating-point operations of one part on the meta device; what it needs is there before."""
    worker, text = Worker(0, task, Mailbox()), run.text

    def arrive(value: Value) -> None:
        worker.keep(
            value,
            task.unpack(
                value,
                [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in task.message(value)],
            ),
        )

    before = {
        "exit": [Run("entry", text)],
        "up": [Run("down", text, entry(text, run.at - 1), at=run.at)],
    }.get(run.part, [])
    if run.part in ("keys", "attend", "end"):
        before = [replace(run, part=part) for part in ("begin", "keys") if part != run.part]
    for operation in (*before, run):
        for other in range(1, run.of + 1) if run.part == "attend" else ():
            arrive(keys(text, other, run.of, run.block))
        if operation.source:
            arrive(operation.source)
        with FlopCounterMode(display=False) as counter:
            worker.run(operation, 0)
    return counter.get_total_flops()


@torch.inference_mode()
def unit_times(task: Task, repeats: int = 5) -> list[float]:
    """Seconds of every unit of the network on this device (see `segments`): the median of some runs, after one that does not count."""
    net, text = task.denoiser, next(iter(task.conditioning))
    units = net.config.segments
    worker = Worker(0, replace(task, cuts=net.cuts(tuple(range(1, units)))), Mailbox())
    seconds: list[list[float]] = [[0.0] * units for _ in range(repeats + 1)]
    for told in seconds:
        for unit, run in in_segments(net, text, units):
            if task.noise.is_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            worker.run(run, 0)
            if task.noise.is_cuda:
                torch.cuda.synchronize()
            told[unit] += time.perf_counter() - start
    return [median(times) for times in zip(*seconds[1:])]


def plan_all(strategy: Strategy, settings: Settings) -> list[StepPlan]:
    """The plans of all steps, as if the discrepancy never fell slowly enough: the switch comes by the cap."""
    rising = [1.0 + step for step in range(settings.steps)]
    return [strategy.plan(step, rising[:step], settings) for step in range(settings.steps)]


def timeline(plans: Sequence[StepPlan], costs: Costs, delays: Mapping[str, float] = {}) -> list[Bar]:
    """Every rank's bars, if everything but the network and the messages took no time. A receive waits for its message.

    A message is under way for `delays[kind]`, in the unit of the costs (no time where not told), one after the other in
    each direction between two ranks.
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
            if isinstance(operation, Run):
                clock[rank] += costs[operation.unit] * (2 if operation.text == "both" else 1)
                bars.append(Bar(rank, step, start, clock[rank], "run", str(operation)))
            elif isinstance(operation, Send):
                lane = rank, operation.to
                free[lane] = max(start, free.get(lane, 0.0)) + delays.get(operation.value.what, 0.0)
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


def message_bytes(task: Task) -> dict[str, int]:
    """Bytes of one message of each kind, where there is one cut."""
    return {kind: task.size(Value(kind)) for kind in ("prediction", "entry", "inner", "discrepancy")}


def total_bytes(plans: Sequence[StepPlan], task: Task) -> Counter[str]:
    """Bytes of all messages by kind, from the schedule alone: what the transport will count, to the byte."""
    return sum((bytes_sent(plan, task.size) for plan in plans), Counter())


def detail(middle: Sequence[int]) -> tuple[int, int]:
    """First and last step to draw in detail, given the steps of the middle stage: with the step before it and at most ZOOM after its first."""
    return middle[0] - 1, min(middle[-1], middle[0] + ZOOM) + 1


def explain(name: str, strategy: Strategy, settings: Settings, task: Task) -> str:
    """Every kind of step as a table of operations, a timeline around the switch, the ideal speed-up and the bytes."""
    plans = plan_all(strategy, settings)
    costs = part_costs(task, plans)
    bars = timeline(plans, costs)
    drawn = ", drawn for a switch by the cap" if name == "paper" else ""
    pieces = [f"{name}: {settings.steps} steps on {strategy.ranks} rank(s){drawn}"]
    parts = (
        [run.unit for plan in plans for run in plan.runs() if run.part != "whole" and not run.of]
        if strategy.ranks > 2
        else ()
    )
    shares = ", ".join(
        f"{part} {costs[part]:.0%}" for part in dict.fromkeys(parts or ("entry", "inner", "exit"))
    )
    pieces.append(f"shares of the network by floating-point operations: {shares}")
    pieces += tables(plans)
    first, last = detail([step for step, plan in enumerate(plans) if plan.stage == "parallelism"] or [1])
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
            tuple(op.value if isinstance(op, Extrapolate) else op for op in operations)
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
    full = [plan for plan in plans if plan.stage != "parallelism"] or plans
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
    """Operations in words; those of all blocks but the first, which are alike, in one line."""
    blocks = [
        getattr(operation.value if isinstance(operation, (Send, Receive)) else operation, "block", 0)
        for operation in operations
    ]
    words = [
        str(operation) if block == 0 else f"the same for blocks 1 to {max(blocks)}"
        for operation, block in zip(operations, blocks)
    ]
    return list(dict.fromkeys(words)) if any(blocks) else words


def runs_of(strategy: Strategy, settings: Settings, rank: int) -> list[Run]:
    """All that a rank may have to run of the network, whenever the switch comes: as early as it can, by the slope, or by the cap."""
    level = [1.0] * settings.steps
    early = [strategy.plan(step, level[:step], settings) for step in range(settings.steps)]
    return list(
        dict.fromkeys(run for plan in [*early, *plan_all(strategy, settings)] for run in plan.runs(rank))
    )
