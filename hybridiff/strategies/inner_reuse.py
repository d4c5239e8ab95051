"""In some steps only the outer parts of the network run; the inner features are continued from earlier steps."""

from typing import Sequence

from hybridiff.schedule import Extrapolate, Operation, Run, StepPlan, ahead, inner
from hybridiff.segments import all_rings
from hybridiff.strategies.condition import guided_step
from hybridiff.strategies.settings import Settings, last_full, stage_of


def inner_reuse(step: int, history: Sequence[float | None], settings: Settings) -> StepPlan:
    """Condition partitioning, but in a few steps, evenly spread, every rank runs entry and exit alone.

    The features h that the inner part would hand to the exit are taken from the line through its last two results, of steps
    a < b: h_i = h_b + (i - b) / (b - a) * (h_b - h_a). Nothing more is sent than the predictions. Which steps: as in `step_extrapolation`.
    """
    saved = settings.reuse.spread(settings.steps)

    def branch(text: str) -> Sequence[Operation]:
        if step not in saved:
            return all_rings(text, 2)  # entry, inner, exit
        continued = Extrapolate(inner(text), last_full(step, saved, 2))
        return [Run("entry", text), continued, Run("exit", text, ahead(inner(text)))]

    return StepPlan(stage_of(step, saved), guided_step([branch("uncond"), branch("cond")], tell=False))
