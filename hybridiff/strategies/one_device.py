"""What runs on one device: the two baselines, and the single branch that is left where there is no guidance."""

from typing import Sequence

from hybridiff.schedule import GUIDED, Guide, Measure, Run, Step, StepPlan, prediction
from hybridiff.strategies.settings import Settings


def serial(step: int, history: Sequence[float | None], settings: Settings) -> StepPlan:
    """Both branches one after the other at batch 1: the exact reference."""
    operations = (Run("whole", "uncond"), Run("whole", "cond"), Measure(), Guide(), Step(GUIDED))
    return StepPlan("warm-up", (operations,))


def batched(step: int, history: Sequence[float | None], settings: Settings) -> StepPlan:
    """Both branches in one batch: the usual baseline. Close to serial, not equal: kernels round by batch size."""
    operations = (Run("whole", "both"), Measure(), Guide(), Step(GUIDED))
    return StepPlan("warm-up", (operations,))


def one_branch(step: int, history: Sequence[float | None], settings: Settings) -> StepPlan:
    """Only the branch with the prompt: all that a guidance of 1 or less needs. Where more ranks were started, each performs this list for itself."""
    return StepPlan("warm-up", ((Run("whole", "cond"), Step(prediction("cond"))),))
