"""Condition-based partitioning, or CFG parallel (paper, Sec. 4.1): one branch a rank, equal to serial in half its time.

More ranks: `sequence_parallel.py`.
"""

from collections.abc import Sequence

from hybridiff.partition import BRANCHES, Partition
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
from hybridiff.strategies.sequence_parallel import divided, evaluate, exchange, output_of
from hybridiff.strategies.settings import Settings


def guided_step(
    evaluations: Sequence[Sequence[Operation]], partition: Partition, share: bool = False
) -> tuple[tuple[Operation, ...], ...]:
    """Exchange the predictions that the evaluations leave (`output_of`), then guide and step on every rank.

    Rank 0 alone measures the discrepancy. With `share` it sends the scalar on, so that all decide on the switch from the same bits.
    """
    ranks = range(partition.ranks)
    join = [Join(branch, partition.ranks // 2) for branch in BRANCHES if divided(partition)]
    measure = [Measure(), *(Send(DISCREPANCY, to=other) for other in ranks[1:] if share)]
    receive = [Receive(DISCREPANCY, source=0)] if share else []
    exchanged = exchange([output_of(rank, partition) for rank in ranks])
    return tuple(
        (*evaluations[rank], *exchanged[rank], *join, *(receive if rank else measure), Guide(), Step(GUIDED))
        for rank in ranks
    )


def condition(
    step: int, history: Sequence[float | None], settings: Settings, partition: Partition
) -> StepPlan:
    """The first half of the ranks evaluates the network without the prompt, the second with it; one exchange of predictions a step."""
    return StepPlan("warm-up", guided_step(evaluate(partition), partition))
