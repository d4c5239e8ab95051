"""`--explain`: a schedule as text, with its operations, timeline, ideal cost and bytes."""

from collections.abc import Sequence

from hybridiff.cost import Bar, idle_ranks, length, part_costs, plan_all, timeline, total_bytes
from hybridiff.denoise import Task
from hybridiff.pipeline import Plan
from hybridiff.schedule import Attend, Extrapolate, Operation, Project, Receive, Send, StepPlan
from hybridiff.switching import MIDDLE

ZOOM = 6  # steps of the middle stage that are drawn in detail, with those around them


def draw(bars: Sequence[Bar], ranks: int, columns_per_unit: int = 16) -> str:
    """The bars as text: two rows a rank, a column a sixteenth of a network evaluation.

    Above, # computes, | begins a span, . waits; below, where its messages leave (>) and are taken (<), or both (x).
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


def detail(middle: Sequence[int]) -> tuple[int, int]:
    """First and last step to draw in detail, given the steps of the middle stage: with the step before it and at most ZOOM after its first."""
    return middle[0] - 1, min(middle[-1], middle[0] + ZOOM) + 1


def explain(name: str, plan: Plan, task: Task) -> str:
    """Every kind of step as a table of operations, a timeline around the switch, the ideal speed-up and the bytes."""
    strategy, settings = plan.strategy, plan.settings
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
    drawn_bars = [bar for bar in bars if first <= bar.step <= last]
    pieces.append(
        f"\ntimeline of steps {drawn_bars[0].step} to {drawn_bars[-1].step} (# computes, | begins a span, . waits; below, > sends, < receives, x both)"
    )
    pieces.append(draw(drawn_bars, strategy.ranks))
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
    """Every kind of step as a table of operations, and in a line each stretch of steps that is of a kind that stands above."""
    pieces: list[str] = []
    seen: dict[
        object, tuple[str, StepPlan]
    ] = {}  # kind, whatever steps are extrapolated from -> the first steps of it
    starts = [step for step, plan in enumerate(plans) if step == 0 or plan != plans[step - 1]]
    for start, end in zip(starts, [*starts[1:], len(plans)]):
        plan, span = plans[start], f"step {start}" if end - start == 1 else f"steps {start} to {end - 1}"
        kind = tuple(
            tuple(op.name if isinstance(op, Extrapolate) else op for op in operations)
            for operations in plan.operations
        )
        if kind in seen:
            where, like = seen[kind]
            lines = dict.fromkeys(
                str(op) for operations in plan.operations for op in operations if isinstance(op, Extrapolate)
            )
            other = f", but {', '.join(lines)}" if plan.operations != like.operations else ""
            between = "\n" if pieces[-1].count("\n") > 1 else ""  # after a table
            pieces.append(f"{between}{span}, {plan.stage}: as {where}{other}")
        else:
            seen[kind] = span, plan
            pieces.append(f"\n{span}, {plan.stage}\n{table(plan)}")
    return pieces


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
