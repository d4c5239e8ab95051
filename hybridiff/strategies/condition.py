"""Condition-based partitioning (paper, Sec. 4.1): one branch a rank, equal to serial at half its time. More ranks: `sharing.py`."""

from typing import Sequence

from hybridiff.schedule import (
    DISCREPANCY,
    GUIDED,
    Guide,
    Join,
    Measure,
    Operation,
    Receive,
    Send,
    Step,
    StepPlan,
)
from hybridiff.strategies.settings import Settings
from hybridiff.strategies.sharing import TEXTS, evaluate, exchange, made_by


def guided_step(
    before: Sequence[Sequence[Operation]], tell: bool, blocks: int = 0
) -> tuple[tuple[Operation, ...], ...]:
    """Exchange the predictions that `before` leaves (see `made_by`: uncond on the first half of the ranks), guide and step on every rank.

    Rank 0 alone measures the discrepancy. With `tell` it sends the scalar on, so that all decide on the switch from the same bits.
    """
    ranks = len(before)
    made = [made_by(rank, ranks, blocks) for rank in range(ranks)]
    join = [Join(text, ranks // 2) for text in TEXTS if made[0].of]
    measure = [Measure(), *(Send(DISCREPANCY, to=other) for other in range(1, ranks) if tell)]
    told = [Receive(DISCREPANCY, source=0)] if tell else []
    return tuple(
        (*mine, *exchanged, *join, *(told if rank else measure), Guide(), Step(GUIDED))
        for rank, (mine, exchanged) in enumerate(zip(before, exchange(made)))
    )


def condition(
    step: int, history: Sequence[float | None], settings: Settings, ranks: int = 2, blocks: int = 0
) -> StepPlan:
    """The first half of the ranks evaluates the network without the prompt, the second with it; one exchange of predictions a step."""
    return StepPlan("warm-up", guided_step(evaluate(ranks, blocks), tell=False, blocks=blocks))
