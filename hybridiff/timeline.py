"""What a schedule costs, before anything is run: its timeline from the cost of each part, as data and as text."""

from collections import Counter
from typing import Callable, Mapping, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from hybridiff.clock import Bar
from hybridiff.denoise import Task
from hybridiff.schedule import Receive, Run, Send, StepPlan, Value, bytes_sent, interleave
from hybridiff.strategies import Settings, Strategy

Costs = dict[str, float]  # part -> cost of one run under one text, in units of the whole network


def part_costs(task: Task) -> Costs:
    """Share of the floating-point operations that falls to each part, counted on the meta device (nothing is computed)."""
    meta = torch.device("meta")
    net, cut = task.denoiser, task.cut
    conditioning = type(task.conditioning["cond"])(*(None if t is None else t.to(meta) for t in task.conditioning["cond"]))
    x, t = task.noise.to(meta, conditioning.text.dtype), torch.zeros(1, device=meta)

    def count(run: Callable):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            result = run()
        return result, counter.get_total_flops()

    (features, skips), entry = count(lambda: net.entry(x, t, conditioning, cut))
    features, inner = count(lambda: net.inner(features, t, conditioning, cut))
    _, exit = count(lambda: net.exit(features, skips, t, conditioning, cut))
    whole = entry + inner + exit
    return {"whole": 1.0, "entry": entry / whole, "inner": inner / whole, "exit": exit / whole}


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
        for rank, operation in interleave(list(enumerate(plan.operations)), lambda r, to: bool(sent.get((r.source, to)))):
            start = clock[rank]
            if isinstance(operation, Run):
                clock[rank] += costs[operation.part] * (2 if operation.text == "both" else 1)
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
    """Bytes of one message of each kind."""
    kinds = ("prediction", "entry", "inner", "discrepancy")
    return {kind: sum(shape.numel() * d.itemsize for shape, d in task.message(Value(kind))) for kind in kinds}


def total_bytes(plans: Sequence[StepPlan], task: Task) -> Counter[str]:
    """Bytes of all messages by kind, from the schedule alone: what the transport will count, to the byte."""
    sizes = message_bytes(task)
    return sum((bytes_sent(plan, sizes) for plan in plans), Counter())


def explain(name: str, strategy: Strategy, settings: Settings, task: Task) -> str:
    """Every different step as a table of operations, a timeline around the switch, the ideal speed-up and the bytes."""
    plans, costs = plan_all(strategy, settings), part_costs(task)
    bars = timeline(plans, costs)
    drawn = ", drawn for a switch by the cap" if name == "paper" else ""
    pieces = [f"{name}: {settings.steps} steps on {strategy.ranks} rank(s){drawn}"]
    shares = ", ".join(f"{part} {costs[part]:.0%}" for part in ("entry", "inner", "exit"))
    pieces.append(f"shares of the network by floating-point operations: {shares}")
    start = 0
    for step in range(1, len(plans) + 1):
        if step == len(plans) or plans[step] != plans[start]:
            span = f"step {start}" if step - start == 1 else f"steps {start} to {step - 1}"
            pieces.append(f"\n{span}, {plans[start].stage}\n{table(plans[start])}")
            start = step
    pipelined = [step for step, plan in enumerate(plans) if plan.stage == "parallelism"]
    middle = pipelined[0] if pipelined else 1
    shown = [bar for bar in bars if middle - 1 <= bar.step <= (pipelined[-1] if pipelined else 1) + 1]
    pieces.append(f"\ntimeline of steps {shown[0].step} to {shown[-1].step} (# computes, | begins a part, . waits; below, > sends, < receives, x both)")
    pieces.append(draw(shown, strategy.ranks))
    cost, sent = length(bars), total_bytes(plans, task)
    pieces.append(f"\nideal cost {cost:.1f} network evaluations, serial {2 * len(plans)}: speed-up {2 * len(plans) / cost:.2f}")
    pieces.append(f"bytes sent: {sent.total():,} ({', '.join(f'{kind} {count:,}' for kind, count in sent.items())})")
    return "\n".join(pieces)


def table(plan: StepPlan) -> str:
    """The operations of every rank, a column each."""
    rows = max(len(operations) for operations in plan.operations)
    cells = [[f"rank {rank}", *map(str, ops), *[""] * (rows - len(ops))] for rank, ops in enumerate(plan.operations)]
    widths = [max(map(len, column)) for column in cells]
    return "\n".join("  " + "   ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in zip(*cells))
