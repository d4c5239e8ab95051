"""In some steps only the outer parts of the network run; the inner features are continued from earlier steps."""

from collections.abc import Sequence

from hybridiff.partition import BRANCHES, Partition
from hybridiff.schedule import Extrapolate, Operation, StepPlan, extrapolated, features
from hybridiff.strategies.condition import guided_step
from hybridiff.strategies.settings import Settings, last_full, stage_of


def inner_reuse(
    step: int, history: Sequence[float | None], settings: Settings, partition: Partition
) -> StepPlan:
    """Condition partitioning, but in a few steps, evenly spread, every rank runs the first and the last of the three spans alone.

    The features h that the inner span would hand to the last one are taken from the line through their last two values, of steps
    a < b: h_i = h_b + (i - b) / (b - a) * (h_b - h_a). Nothing more is sent than the predictions. Which steps: as in `step_extrapolation`.
    """
    skipped = settings.reuse.spread(settings.steps)
    first, inner, last = partition.spans

    def branch(name: str) -> Sequence[Operation]:
        if step not in skipped:
            return [partition.run(span, name) for span in (first, inner, last)]
        h = features(name, inner[1])
        continued = Extrapolate(h, last_full(step, skipped, 2))
        return [partition.run(first, name), continued, partition.run(last, name, extrapolated(h))]

    return StepPlan(stage_of(step, skipped), guided_step([branch(name) for name in BRANCHES], partition))
