"""The three stages as published (paper, Sec. 4, and the released code).

Warm-up and fully-connecting are condition partitioning. In between, steps `first..tau2` run as a two-stage pipeline: each
rank evaluates only its part of the network, on features that the other made one step earlier. There is one prediction in
these steps, rank 1's, and no guidance: that is what the released code computes, bit for bit, and where its quality goes.
The first of these steps fills the pipeline: rank 1 runs the whole network.
"""

from typing import Sequence

from hybridiff.schedule import Receive, Run, Send, Step, StepPlan, entry, inner, prediction
from hybridiff.strategies.condition import guided_step
from hybridiff.strategies.settings import Settings
from hybridiff.switching import Switch, find_switch

MERGED = prediction("cond")  # the one prediction of the pipelined steps
WHOLE = [Run("entry", "cond"), Run("inner", "cond", entry("cond")), Run("exit", "cond", inner("cond"))]


def guided_stage(step: int, switch: Switch | None) -> StepPlan | None:
    """Condition partitioning before and after the pipelined steps; None in them."""
    stage = switch.stage(step) if switch else "warm-up"
    if stage == "parallelism":
        return None
    whole = [Run("whole", "uncond")], [Run("whole", "cond")]
    return StepPlan(stage, guided_step(whole, tell=switch is None))


def paper_nested(step: int, history: Sequence[float | None], settings: Settings) -> StepPlan:
    """The U-Net: rank 0 owns the inner part (without the prompt), rank 1 entry and exit (with it).

    In step i rank 0 runs the inner part on rank 1's entry features of step i-1, and rank 1 runs entry and exit around rank 0's
    inner features of step i-1, which in turn come from the latents of step i-2.
    """
    switch = find_switch(history, settings.rule)
    if plan := guided_stage(step, switch):
        return plan
    fill = step == switch.first
    goes_on = step < min(switch.tau2, settings.steps - 1)  # the last pipelined step leaves no features behind

    rank0 = [Receive(MERGED, source=1), Step(MERGED)]
    if goes_on:
        made = [Run("entry", "uncond"), Run("inner", "uncond", entry("uncond"))]
        stale = [Run("inner", "uncond", entry("cond"))]
        rank0 = [*(made if fill else stale), Send(inner("uncond"), to=1), Receive(entry("cond"), source=1), *rank0]

    head, *tail = WHOLE if fill else (Run("entry", "cond"), Run("exit", "cond", inner("uncond")))
    rank1 = [head, *([Send(entry("cond"), to=0)] if goes_on else []), *tail, Send(MERGED, to=0)]
    rank1 += [*([Receive(inner("uncond"), source=0)] if goes_on else []), Step(MERGED)]
    return StepPlan("parallelism", (tuple(rank0), tuple(rank1)))


def paper_halves(step: int, history: Sequence[float | None], settings: Settings) -> StepPlan:
    """The MMDiT: rank 0 owns the first half of the blocks (without the prompt), rank 1 the second half (with it).

    In step i rank 1 runs its half on the tokens, image and text, that rank 0 made in step i-1. (The released code freezes them
    at the filling step, by an index that is off by one; we follow the intent.)
    """
    switch = find_switch(history, settings.rule)
    if plan := guided_stage(step, switch):
        return plan
    goes_on = step < min(switch.tau2, settings.steps - 1)

    rank0 = [Receive(MERGED, source=1), Step(MERGED)]
    if goes_on:
        first_half = [Run("entry", "uncond"), Run("inner", "uncond", entry("uncond"))]
        rank0 = [*first_half, Send(inner("uncond"), to=1), *rank0]

    rank1 = list(WHOLE) if step == switch.first else [Run("exit", "cond", inner("uncond"))]
    rank1 += [Send(MERGED, to=0), *([Receive(inner("uncond"), source=0)] if goes_on else []), Step(MERGED)]
    return StepPlan("parallelism", (tuple(rank0), tuple(rank1)))
