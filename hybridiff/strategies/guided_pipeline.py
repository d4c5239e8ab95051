"""The paper's two-stage pipeline with guidance kept: one branch a step, in turns, and each branch keeps its own inner features.

Rank 1 owns both ends of the network, rank 0 the inner span, and both work at the same time. What is not fresh in a step is continued
along a line: the inner features, the newest of which are two steps old (one in the first skipped step), and the prediction of the
branch whose turn it is not.
"""

from collections.abc import Sequence

from hybridiff.partition import Partition
from hybridiff.schedule import (
    GUIDED,
    Extrapolate,
    Guide,
    Operation,
    Receive,
    Send,
    Step,
    StepPlan,
    extrapolated,
    features,
    prediction,
)
from hybridiff.strategies.condition import guided_step
from hybridiff.strategies.settings import Settings, stage_of


def turn(step: int, window: range) -> str:
    """The branch that is computed in a step of the window."""
    return ("cond", "uncond")[(step - window.start) % 2]


def computed_at(branch: str, before: int, window: range) -> tuple[int, int]:
    """The last two steps before step `before` that computed something of a branch: all full steps, every second one of the window."""
    steps = [step for step in range(before) if step not in window or turn(step, window) == branch]
    return steps[-2], steps[-1]


def full_step(step: int, window: range, partition: Partition) -> StepPlan:
    """Condition partitioning; the last two before the window also hand rank 0's inner features to rank 1."""
    uncond: list[Operation] = [partition.run(span, "uncond") for span in partition.spans]
    cond: list[Operation] = [partition.run(span, "cond") for span in partition.spans]
    # a single skipped step is one with the prompt, whose features rank 1 has
    if step in (window.start - 2, window.start - 1) and len(window) > 1:
        h = features("uncond", partition.spans[1][1])
        uncond.insert(2, Send(h, to=1))
        cond.append(Receive(h, source=0))
    return StepPlan(stage_of(step, window), guided_step([uncond, cond], partition))


def guided_pipeline(
    step: int, history: Sequence[float | None], settings: Settings, partition: Partition
) -> StepPlan:
    """A window of cheaper steps between full ones; each costs the slower of the inner span and both ends (the first and last: the latter).

    The branches take turns, the prompt first. In step i of the window with branch c, rank 1 runs the first span for c and hands its features
    to rank 0, continues the inner features of c, h_i = h_b + (i - b) / (b - a) * (h_b - h_a), and runs the last span: the prediction of c,
    which rank 0 gets too. Both continue that of the other branch from its last two in the same way, guide and step. Meanwhile rank 0 runs the
    inner span on the features of step i-1, given that step's time, and hands the result to rank 1, to be used in step i+1, which has
    the same branch as i-1. What would come too late is neither computed nor sent. From the fourth step of the window on, a, b are
    i-4, i-2 for features and i-3, i-1 for predictions; before, full steps stand in (`computed_at`).
    """
    window = settings.reuse.consecutive(settings.steps)
    if step not in window:
        return full_step(step, window, partition)
    branch, other = turn(step, window), turn(step + 1, window)
    first, inner, last = partition.spans
    continued = Extrapolate(prediction(other), computed_at(other, step, window))
    guide = Guide(**{branch: prediction(branch), other: extrapolated(prediction(other))})

    rank0: list[Operation] = []
    rank1: list[Operation] = [partition.run(first, branch)]
    if step + 2 in window:
        rank1.append(Send(features(branch, inner[0]), to=0))
    h = features(branch, inner[1])
    rank1.append(Extrapolate(h, computed_at(branch, step, window)))
    rank1.append(partition.run(last, branch, extrapolated(h)))
    rank1.append(Send(prediction(branch), to=0))
    if step - 1 in window and step + 1 in window:  # what rank 0 computes in this step serves the next one
        rank0 += [partition.run(inner, other, late=1), Send(features(other, inner[1]), to=1)]
        rank1.append(Receive(features(other, inner[1]), source=0))
    if step + 2 in window:
        rank0.append(Receive(features(branch, inner[0]), source=1))
    rank0.append(Receive(prediction(branch), source=1))
    end = continued, guide, Step(GUIDED)
    return StepPlan("skipping", ((*rank0, *end), (*rank1, *end)))
