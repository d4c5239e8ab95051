"""Strategies: pure functions that write schedules, one short file each.

Every strategy has the same face: plan(step, history, settings) -> StepPlan, where `history` holds the discrepancies measured
in steps 0..step-1: None where none was, or where the value stayed on rank 0 (`paper` shares them until it has switched). Those for any even
number of ranks also take `ranks`, and `blocks`: how many of the network's blocks a branch's ranks can share, 0 where it cannot be divided.
"""

from functools import partial
from typing import Any, Callable, NamedTuple, Sequence

from hybridiff.schedule import StepPlan
from hybridiff.segments import even
from hybridiff.strategies.condition import condition
from hybridiff.strategies.guided_pipeline import guided_pipeline
from hybridiff.strategies.inner_reuse import inner_reuse
from hybridiff.strategies.one_device import batched, one_branch, serial
from hybridiff.strategies.paper import paper_nested, paper_sequential
from hybridiff.strategies.settings import Reuse, Settings
from hybridiff.strategies.step_extrapolation import step_extrapolation
from models.mmdit import MMDiT, MMDiTConfig
from models.unet import UNet, UNetConfig


class Strategy(NamedTuple):
    """A strategy, the number of ranks that it is written for, and what it needs of the cut."""

    plan: Callable[[int, Sequence[float | None], Settings], StepPlan]
    ranks: int
    outer_work: bool = False  # entry and exit must both do work: `nested_cut` instead of the paper's cut
    many: bool = False  # also for larger even numbers of ranks, see `on`

    def counts(self, config: UNetConfig | MMDiTConfig) -> list[int]:
        """The numbers of ranks that can make a picture together with a network."""
        return list(range(2, config.segments + 1, 2)) if self.many else [self.ranks]

    def on(self, ranks: int, config: UNetConfig | MMDiTConfig) -> "Strategy":
        """The same strategy on one of its `counts` of ranks."""
        if ranks == self.ranks:
            return self
        return self._replace(plan=partial(self.plan, ranks=ranks, blocks=config.shared_blocks), ranks=ranks)

    def cuts(self, denoiser: UNet | MMDiT) -> tuple[Any, ...]:
        """Where this strategy cuts a denoiser: once, or for N ranks N - 1 times."""
        if self.outer_work:
            return (denoiser.nested_cut(),)
        return (
            denoiser.cuts(even(denoiser.unit_sizes(), self.ranks))
            if self.ranks > 2
            else (denoiser.default_cut(),)
        )


def strategies(family: str) -> dict[str, Strategy]:
    """The strategies by name for a family ("sdxl": cuts are nested; "sd3": they follow one another)."""
    return {
        "serial": Strategy(serial, 1),
        "batched": Strategy(batched, 1),
        "one-branch": Strategy(one_branch, 1),
        "condition": Strategy(condition, 2, many=True),
        "paper": Strategy(paper_nested if family == "sdxl" else paper_sequential, 2, many=True),
        "step-extrapolation": Strategy(step_extrapolation, 2, many=True),
        "inner-reuse": Strategy(inner_reuse, 2, outer_work=True),
        "guided-pipeline": Strategy(guided_pipeline, 2, outer_work=True),
    }
