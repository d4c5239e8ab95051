"""Strategies: pure functions that write schedules, one short file each.

Every strategy has the same face: (step, history, settings, partition) -> StepPlan, where `history` holds the discrepancies measured
in steps 0..step-1: None where none was, or where the value stayed on rank 0 (`paper` shares them until it has switched), and `partition`
says which rank owns which part of the network.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hybridiff.partition import Partition, partition
from hybridiff.schedule import StepPlan
from hybridiff.strategies.condition import condition
from hybridiff.strategies.guided_pipeline import guided_pipeline
from hybridiff.strategies.inner_reuse import inner_reuse
from hybridiff.strategies.one_device import batched, one_branch, serial
from hybridiff.strategies.paper import paper
from hybridiff.strategies.settings import Reuse, Settings
from hybridiff.strategies.step_extrapolation import step_extrapolation
from models.tape import Denoiser

__all__ = ["STRATEGIES", "Reuse", "Settings", "Strategy"]


@dataclass(frozen=True)
class Strategy:
    """A strategy and the ranks that it is written for; `on` a network it can plan."""

    function: Callable[[int, Sequence[float | None], Settings, Partition], StepPlan]
    ranks: int = 2
    many: bool = False  # also for larger even numbers of ranks
    nested: bool = False  # both ends of the network on rank 1, the units between them on rank 0
    partition: Partition = None  # type: ignore[assignment]  # of a network, from `on`

    def counts(self, denoiser: Denoiser) -> list[int]:
        """The numbers of ranks that can make a picture together with a network."""
        return list(range(2, denoiser.most_ranks + 1, 2)) if self.many else [self.ranks]

    def on(self, denoiser: Denoiser, ranks: int | None = None, times: Sequence | None = None) -> "Strategy":
        """The same strategy for a network on one of its `counts` of ranks; `times` as in `models.tape.Denoiser.split`."""
        ranks = ranks or self.ranks
        return replace(self, ranks=ranks, partition=partition(denoiser, ranks, times, self.nested))

    def plan(self, step: int, history: Sequence[float | None], settings: Settings) -> StepPlan:
        """The operations of every rank in a step."""
        return self.function(step, history, settings, self.partition)


STRATEGIES = {
    "serial": Strategy(serial, ranks=1),
    "batched": Strategy(batched, ranks=1),
    "one-branch": Strategy(one_branch, ranks=1),
    "condition": Strategy(condition, many=True),
    "paper": Strategy(paper, many=True),
    "step-extrapolation": Strategy(step_extrapolation, many=True),
    "inner-reuse": Strategy(inner_reuse, nested=True),
    "guided-pipeline": Strategy(guided_pipeline, nested=True),
}
