"""Some steps are not computed at all: their guided prediction lies on the line through the last two computed ones."""

from typing import Sequence

from hybridiff.schedule import GUIDED, Extrapolate, Step, StepPlan, ahead
from hybridiff.strategies.condition import guided_step
from hybridiff.strategies.settings import Settings
from hybridiff.strategies.sharing import evaluate
from hybridiff.switching import Stage


def stage_of(step: int, reused: Sequence[int]) -> Stage:
    """The middle stage reaches from the first to the last step that saves work."""
    if not reused or step < reused[0]:
        return "warm-up"
    return "parallelism" if step <= reused[-1] else "fully-connecting"


def last_two(step: int, reused: Sequence[int]) -> tuple[int, ...]:
    """The last two steps before this one that were computed in full."""
    return tuple(s for s in range(step) if s not in reused)[-2:]


def step_extrapolation(
    step: int, history: Sequence[float | None], settings: Settings, ranks: int = 2, blocks: int = 0
) -> StepPlan:
    """Condition partitioning, but a few steps, evenly spread, cost nothing and move nothing.

    With the guided predictions g_a, g_b of the last two computed steps a < b, a skipped step i takes
    g_i = g_b + (i - b) / (b - a) * (g_b - g_a) and lets the sampler step along it.
    """
    reused = settings.reuse.spread(settings.steps)
    if step in reused:
        skip = Extrapolate(GUIDED, last_two(step, reused)), Step(ahead(GUIDED))
        return StepPlan("parallelism", (skip,) * ranks)
    return StepPlan(stage_of(step, reused), guided_step(evaluate(ranks, blocks), tell=False, blocks=blocks))
