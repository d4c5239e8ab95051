"""Strategies: pure functions that write schedules, one short file each.

Every strategy has the same face: plan(step, history, settings) -> StepPlan, where `history` holds the discrepancies measured
in steps 0..step-1 (as far as they are shared by all ranks).
"""

from typing import Callable, NamedTuple, Sequence

from hybridiff.schedule import StepPlan
from hybridiff.strategies.condition import condition
from hybridiff.strategies.paper import paper_halves, paper_nested
from hybridiff.strategies.settings import Settings
from hybridiff.strategies.one_device import batched, serial


class Strategy(NamedTuple):
    """A strategy and the number of ranks that it is written for."""

    plan: Callable[[int, Sequence[float | None], Settings], StepPlan]
    ranks: int


def strategies(family: str) -> dict[str, Strategy]:
    """The strategies by name for a family ("sdxl": the cut is nested; "sd3": the cut halves the network)."""
    return {
        "serial": Strategy(serial, 1),
        "batched": Strategy(batched, 1),
        "condition": Strategy(condition, 2),
        "paper": Strategy(paper_nested if family == "sdxl" else paper_halves, 2),
    }
