"""Some steps are not computed at all: their guided prediction is continued along the line through the last two computed ones."""

from collections.abc import Sequence

from hybridiff.partition import Partition
from hybridiff.schedule import GUIDED, Extrapolate, Step, StepPlan, extrapolated
from hybridiff.strategies.condition import guided_step
from hybridiff.strategies.sequence_parallel import evaluate
from hybridiff.strategies.settings import Settings, last_full, stage_of


def step_extrapolation(
    step: int, history: Sequence[float | None], settings: Settings, partition: Partition
) -> StepPlan:
    """Condition partitioning, but some steps, evenly spread, compute and send nothing: of the M steps after the first `start` and before
    the last `end`, the j-th of n skipped ones is start + (2 j + 1) M // (2 n), j = 0 .. n - 1 (`Reuse.spread`).

    With the guided predictions g_a, g_b of the last two computed steps a < b, a skipped step i takes
    g_i = g_b + (i - b) / (b - a) * (g_b - g_a) and lets the sampler step along it. Where the predictions do not lie on lines, as with
    long strides and strong guidance, it takes g_i = g_b: if, with z the computed step before a, the line through g_z and g_a
    would have missed g_b by more than |g_b - g_a| (Euclidean norms). Where no z was computed, the line is not tested. All ranks hold the
    same predictions, so they agree without a message (devices of different kinds, which round differently, might not).
    """
    skipped = settings.reuse.spread(settings.steps)
    if step in skipped:
        operations = Extrapolate(GUIDED, last_full(step, skipped, 3)), Step(extrapolated(GUIDED))
        return StepPlan("skipping", (operations,) * partition.ranks)
    return StepPlan(stage_of(step, skipped), guided_step(evaluate(partition), partition))
