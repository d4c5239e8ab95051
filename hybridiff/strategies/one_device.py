"""What runs on one device: the two baselines, and the single branch that is left where there is no guidance."""

from collections.abc import Sequence

from hybridiff.partition import Partition
from hybridiff.schedule import GUIDED, Guide, Measure, Step, StepPlan, prediction
from hybridiff.strategies.settings import Settings


def serial(step: int, history: Sequence[float | None], settings: Settings, partition: Partition) -> StepPlan:
    """Both branches one after the other at batch 1: the exact reference."""
    runs = partition.whole("uncond"), partition.whole("cond")
    return StepPlan("warm-up", ((*runs, Measure(), Guide(), Step(GUIDED)),))


def batched(step: int, history: Sequence[float | None], settings: Settings, partition: Partition) -> StepPlan:
    """Both branches in one batch: the usual baseline. Close to serial, not equal: kernels round by batch size."""
    return StepPlan("warm-up", ((partition.whole("both"), Measure(), Guide(), Step(GUIDED)),))


def one_branch(
    step: int, history: Sequence[float | None], settings: Settings, partition: Partition
) -> StepPlan:
    """Only the branch with the prompt: all that a guidance of 1 or less needs. If there are more ranks, each runs it for itself."""
    return StepPlan("warm-up", ((partition.whole("cond"), Step(prediction("cond"))),))
