"""In some steps only the outer parts of the network run; the inner features are continued from earlier steps."""

from typing import Sequence

from hybridiff.schedule import Extrapolate, Operation, Run, StepPlan, ahead, entry, inner
from hybridiff.strategies.condition import guided_step
from hybridiff.strategies.settings import Settings
from hybridiff.strategies.step_extrapolation import last_full, stage_of


def in_parts(text: str) -> list[Operation]:
    """The whole network, part by part, so that the inner features stay in the store."""
    return [Run("entry", text), Run("inner", text, entry(text)), Run("exit", text, inner(text))]


def inner_reuse(step: int, history: Sequence[float | None], settings: Settings) -> StepPlan:
    """Condition partitioning, but in a few steps, evenly spread, every rank runs entry and exit alone.

    The features h that the inner part would hand to the exit are taken from the line through its last two results, of steps
    a < b: h_i = h_b + (i - b) / (b - a) * (h_b - h_a). Nothing more is sent than the predictions.
    """
    reused = settings.reuse.spread(settings.steps)

    def branch(text: str) -> list[Operation]:
        if step not in reused:
            return in_parts(text)
        continued = Extrapolate(inner(text), last_full(step, reused, 2))
        return [Run("entry", text), continued, Run("exit", text, ahead(inner(text)))]

    return StepPlan(stage_of(step, reused), guided_step([branch("uncond"), branch("cond")], tell=False))
