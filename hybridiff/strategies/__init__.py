"""Strategies: pure functions that write schedules, one short file each.

Every strategy has the same face: plan(step, history, settings) -> StepPlan, where `history` holds the discrepancies measured
in steps 0..step-1 (as far as they are shared by all ranks).
"""

from typing import Any, Callable, NamedTuple, Sequence

from hybridiff.schedule import StepPlan
from hybridiff.strategies.condition import condition
from hybridiff.strategies.guided_pipeline import guided_pipeline
from hybridiff.strategies.inner_reuse import inner_reuse
from hybridiff.strategies.one_device import batched, one_branch, serial
from hybridiff.strategies.paper import paper_halves, paper_nested
from hybridiff.strategies.settings import Reuse, Settings
from hybridiff.strategies.step_extrapolation import step_extrapolation
from models.mmdit import MMDiT
from models.unet import UNet


class Strategy(NamedTuple):
    """A strategy, the number of ranks that it is written for, and what it needs of the cut."""

    plan: Callable[[int, Sequence[float | None], Settings], StepPlan]
    ranks: int
    nested: bool = False  # entry and exit must both do work: `nested_cut` instead of the paper's cut

    def cut(self, denoiser: UNet | MMDiT) -> Any:
        """Where this strategy cuts a denoiser."""
        return denoiser.nested_cut() if self.nested else denoiser.default_cut()


def strategies(family: str) -> dict[str, Strategy]:
    """The strategies by name for a family ("sdxl": the cut is nested; "sd3": the cut halves the network)."""
    return {
        "serial": Strategy(serial, 1),
        "batched": Strategy(batched, 1),
        "one-branch": Strategy(one_branch, 1),
        "condition": Strategy(condition, 2),
        "paper": Strategy(paper_nested if family == "sdxl" else paper_halves, 2),
        "step-extrapolation": Strategy(step_extrapolation, 2),
        "inner-reuse": Strategy(inner_reuse, 2, nested=True),
        "guided-pipeline": Strategy(guided_pipeline, 2, nested=True),
    }
