"""Condition-based partitioning (paper, Sec. 4.1): one branch a rank. Equal to serial, at half its time."""

from typing import Sequence

from hybridiff.schedule import DISCREPANCY, GUIDED, Guide, Measure, Operation, Receive, Run, Send, Step, StepPlan, prediction
from hybridiff.strategies.settings import Settings


def guided_step(before: Sequence[Sequence[Operation]], tell: bool) -> tuple[tuple[Operation, ...], ...]:
    """Exchange the predictions that `before` leaves (uncond on rank 0, cond on rank 1), guide and step on both ranks.

    Rank 0 alone measures the discrepancy. With `tell` it sends the scalar on, so that both decide from the same bits.
    """
    uncond, cond = prediction("uncond"), prediction("cond")
    rank0 = [*before[0], Send(uncond, to=1), Receive(cond, source=1), Measure()]
    rank1 = [*before[1], Send(cond, to=0), Receive(uncond, source=0)]
    if tell:
        rank0.append(Send(DISCREPANCY, to=1))
        rank1.append(Receive(DISCREPANCY, source=0))
    return (*rank0, Guide(), Step(GUIDED)), (*rank1, Guide(), Step(GUIDED))


def condition(step: int, history: Sequence[float | None], settings: Settings) -> StepPlan:
    """Rank 0 evaluates the network without the prompt, rank 1 with it; one exchange a step."""
    return StepPlan("warm-up", guided_step([[Run("whole", "uncond")], [Run("whole", "cond")]], tell=False))
