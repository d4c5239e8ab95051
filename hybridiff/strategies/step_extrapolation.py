"""Some steps are not computed at all: their guided prediction is continued along the line through the last two computed ones."""

from typing import Sequence

from hybridiff.schedule import GUIDED, Extrapolate, Step, StepPlan, ahead
from hybridiff.strategies.condition import guided_step
from hybridiff.strategies.settings import Settings, last_full, stage_of
from hybridiff.strategies.sharing import evaluate


def step_extrapolation(
    step: int, history: Sequence[float | None], settings: Settings, ranks: int = 2, blocks: int = 0
) -> StepPlan:
    """Condition partitioning, but some steps, evenly spread, cost nothing and move nothing: of the steps after the first `start` and before the last
    `end`, M in number, the j-th of n saved ones is start + (2 j + 1) M // (2 n), j = 0 .. n - 1 (`Reuse.spread`).

    With the guided predictions g_a, g_b of the last two computed steps a < b, a saved step i takes
    g_i = g_b + (i - b) / (b - a) * (g_b - g_a) and lets the sampler step along it. Where the predictions do not lie on lines, which
    long strides and strong guidance bring about, it takes g_i = g_b: if, with z the computed step before a, the line through g_z and g_a
    would have missed g_b by more than |g_b - g_a| (Euclidean norms). Where no z was computed, the line is taken untried. All ranks hold the
    same predictions, so that they agree without a message (devices of different kinds, which round differently, might not).
    """
    saved = settings.reuse.spread(settings.steps)
    if step in saved:
        skip = Extrapolate(GUIDED, last_full(step, saved, 3)), Step(ahead(GUIDED))
        return StepPlan("parallelism", (skip,) * ranks)
    return StepPlan(stage_of(step, saved), guided_step(evaluate(ranks, blocks), tell=False, blocks=blocks))
