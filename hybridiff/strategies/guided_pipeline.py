"""The paper's two-stage pipeline with guidance kept: one text a step, alternating, and each branch keeps its own inner features.

Rank 1 owns entry and exit, rank 0 the inner part, both work at the same time. What is not fresh in a step is continued along
a line: the inner features, the newest of which are two steps old (one in the first pipelined step), and the prediction of the branch whose
turn it is not.
"""

from typing import Sequence

from hybridiff.schedule import (
    GUIDED,
    Extrapolate,
    Guide,
    Operation,
    Receive,
    Run,
    Send,
    Step,
    StepPlan,
    ahead,
    entry,
    inner,
    prediction,
)
from hybridiff.segments import all_rings
from hybridiff.strategies.condition import guided_step
from hybridiff.strategies.settings import Settings, stage_of


def turn(step: int, window: range) -> str:
    """The text under which a pipelined step is computed."""
    return ("cond", "uncond")[(step - window.start) % 2]


def computed_at(text: str, before: int, window: range) -> tuple[int, int]:
    """The last two steps before step `before` that computed something under a text: all full steps, every second pipelined one."""
    steps = [step for step in range(before) if step not in window or turn(step, window) == text]
    return steps[-2], steps[-1]


def full_step(step: int, window: range) -> StepPlan:
    """Condition partitioning; the last two before the window also hand rank 0's inner features to rank 1."""
    enter, middle, leave = all_rings("uncond", 2)
    uncond: list[Operation] = [enter, middle, leave]
    cond: list[Operation] = [*all_rings("cond", 2)]
    if (
        step in (window.start - 2, window.start - 1) and len(window) > 1
    ):  # a single one is under the prompt, whose features rank 1 has
        uncond = [enter, middle, Send(inner("uncond"), to=1), leave]
        cond.append(Receive(inner("uncond"), source=0))
    return StepPlan(stage_of(step, window), guided_step([uncond, cond], tell=False))


def guided_pipeline(step: int, history: Sequence[float | None], settings: Settings) -> StepPlan:
    """A window of pipelined steps between full ones; each costs the slower of the inner part and entry with exit (the first and last: the latter).

    The texts take turns, the prompt first. In pipelined step i under text c, rank 1 runs entry(c) and hands its features to rank 0, continues the
    inner features of c, h_i = h_b + (i - b) / (b - a) * (h_b - h_a), and runs exit(c): the prediction of c, which rank 0 gets too. Both continue that of
    the other text from its last two in the same way, guide and step. Meanwhile rank 0 runs the inner part on the entry features of step i-1, told
    that step's time, and hands the result to rank 1, to be used in step i+1, which has the same text as i-1. What would come too late is neither made nor sent.
    From the fourth pipelined step on a, b are i-4, i-2 for features and i-3, i-1 for predictions; before, full steps stand in (`computed_at`).
    """
    window = settings.reuse.consecutive(settings.steps)
    if step not in window:
        return full_step(step, window)
    text, other = turn(step, window), turn(step + 1, window)
    continued = Extrapolate(prediction(other), computed_at(other, step, window))
    guide: list[Operation] = [
        continued,
        Guide(**{text: prediction(text), other: ahead(prediction(other))}),
        Step(GUIDED),
    ]

    rank0: list[Operation] = []
    rank1: list[Operation] = [Run("entry", text)]
    if step + 2 in window:
        rank1.append(Send(entry(text), to=0))
    rank1 += [
        Extrapolate(inner(text), computed_at(text, step, window)),
        Run("exit", text, ahead(inner(text))),
    ]
    rank1.append(Send(prediction(text), to=0))
    if step - 1 in window and step + 1 in window:  # what rank 0 makes in this step serves the next one
        rank0 += [Run("inner", other, entry(other), late=1), Send(inner(other), to=1)]
        rank1.append(Receive(inner(other), source=0))
    if step + 2 in window:
        rank0.append(Receive(entry(text), source=1))
    rank0.append(Receive(prediction(text), source=1))
    return StepPlan("parallelism", (tuple(rank0 + guide), tuple(rank1 + guide)))
