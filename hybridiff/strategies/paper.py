"""The three stages as published (paper, Sec. 4, and the released code; more than two ranks: Sec. 4.5, layer-wise).

Warm-up and fully-connecting are condition partitioning. In between, steps `first..tau2` run as a pipeline: the network is cut in as
many segments as there are ranks, and each rank evaluates only its own, under the text of its branch and told the time of the present step: the
rank that reads the latents on the present ones, and all on features that their neighbours made one step earlier. There is one prediction in
these steps, which goes to all ranks, and no guidance: that is what the released code computes, and where its quality goes. The first of these
steps fills the pipeline: the whole network is run. Features that would come too late for the last of these steps are neither made nor sent.
"""

from typing import Sequence

from hybridiff.schedule import Receive, Run, Send, Step, StepPlan, Value, entry, inner, prediction
from hybridiff.segments import all_rings
from hybridiff.strategies.condition import guided_step
from hybridiff.strategies.settings import Settings
from hybridiff.strategies.sharing import evaluate, exchange, text_of
from hybridiff.switching import Switch, find_switch

MERGED = prediction("cond")  # the one prediction of the pipelined steps
Hand = tuple[Value, int, int]  # a value, the rank that makes it, the rank that needs it


def guided_stage(step: int, switch: Switch | None, ranks: int, blocks: int) -> StepPlan | None:
    """Condition partitioning before and after the pipelined steps; None in them."""
    stage = switch.stage(step) if switch else "warm-up"
    if stage == "parallelism":
        return None
    return StepPlan(stage, guided_step(evaluate(ranks, blocks), tell=switch is None, blocks=blocks))


def merged_step(runs: Sequence[Sequence[Run]], handed: Sequence[Hand], maker: int) -> StepPlan:
    """Every rank's runs; each value is sent as soon as it is made and taken at the end; all step along the prediction of rank `maker`."""
    lists = []
    for rank, mine in enumerate(runs):
        due = {value: receiver for value, sender, receiver in handed if sender == rank}
        made = [
            op
            for run in mine
            for op in (run, *([Send(run.leaves, to=due[run.leaves])] if run.leaves in due else []))
        ]
        taken = [Receive(value, sender) for value, sender, receiver in handed if receiver == rank]
        merged = exchange([MERGED if other == maker else None for other in range(len(runs))])[rank]
        lists.append((*made, *(merged + taken if rank == maker else taken + merged), Step(MERGED)))
    return StepPlan("parallelism", tuple(lists))


def paper_nested(
    step: int, history: Sequence[float | None], settings: Settings, ranks: int = 2, blocks: int = 0
) -> StepPlan:
    """The U-Net: rank 0 owns the innermost part, the last rank entry and exit, each rank between them a ring.

    Two ranks, in step i: rank 1 runs e_i = entry(x_i) and exit(e_i, h_(i-1)) under the prompt, which is the step's prediction; rank 0 runs
    h_i = inner(e_(i-1)) without it. With more, every rank runs its way in on what its outer neighbour made in step i-1 (the last rank: on
    the latents), and its way out on what its inner neighbour made then. So the innermost features in a prediction come from the latents of
    step i - 2 (ranks - 1), or of the filling step where that is later. In the filling step the first rank with the prompt runs the whole
    network, whose prediction is the step's; rank 0 runs all the way in without the prompt, and the way out of its branch's rings, for their
    features only.
    """
    switch = find_switch(history, settings.rule)
    if plan := guided_stage(step, switch, ranks, blocks):
        return plan
    left = (
        min(switch.tau2, settings.steps - 1) - step
    )  # pipelined steps after this one: ring r's way out serves the r-th of them
    innermost, fill, leader = ranks - 1, step == switch.first, {"uncond": 0, "cond": ranks // 2}

    def text(ring: int) -> str:
        return text_of(innermost - ring, ranks)

    def own(ring: int) -> list[Run]:
        if ring == innermost:
            return [Run("inner", text(ring), entry(text(ring - 1), ring - 1), at=ring - 1)]
        outside, inside = entry(text(ring - 1), ring - 1), inner(text(ring + 1), ring)
        if ring == 0:
            return [Run("entry", text(0)), Run("exit", text(0), inside)]
        return [Run("down", text(ring), outside, at=ring), Run("up", text(ring), inside, at=ring)]

    # between the rings `cut` and `cut` + 1; what goes in is run on by ring `cut` + 1 a step later, so its last use comes a step earlier
    inwards = [(entry(text(cut), cut), cut, cut + 1) for cut in range(min(ranks - 1, left - 1))]
    outwards = [(inner(text(cut + 1), cut), cut + 1, cut) for cut in range(min(ranks - 1, left))]
    handed: list[Hand] = []
    for value, maker, user in inwards + outwards:
        sender, receiver = leader[value.text] if fill else innermost - maker, innermost - user
        if sender != receiver:
            handed.append((value, sender, receiver))
    runs = [own(innermost - rank) if innermost - rank <= left else [] for rank in range(ranks)]
    if fill:
        runs = [[] for _ in range(ranks)]
        runs[leader["cond"]] = all_rings("cond", ranks)
        if ranks // 2 <= left:
            runs[0] = [
                run
                for run in all_rings("uncond", ranks)
                if run.part not in ("up", "exit") or run.at >= ranks // 2
            ]
    return merged_step(runs, handed, leader["cond"] if fill else innermost)


def paper_sequential(
    step: int, history: Sequence[float | None], settings: Settings, ranks: int = 2, blocks: int = 0
) -> StepPlan:
    """The MMDiT: each rank owns a segment of the blocks, rank 0 the first; half of the ranks is without the prompt.

    Two ranks, in step i: rank 0 runs h_i = inner(entry(x_i)) without the prompt, rank 1 exit(h_(i-1)) with it, which is the step's prediction:
    it comes from the latents of step i - 1. With N ranks each runs its segment on the tokens, image and text, that the rank before it made in
    step i-1, and the latents are those of step i - (N - 1), or of the filling step where that is later. (The released code freezes the tokens at
    the filling step, by an index that is off by one; we follow the intent.) The words of the text come with them, so of its own text a later
    rank adds only the pooled vector. In the filling step each rank runs all segments up to its own.
    """
    switch = find_switch(history, settings.rule)
    if plan := guided_stage(step, switch, ranks, blocks):
        return plan
    left = min(switch.tau2, settings.steps - 1) - step  # pipelined steps after this one
    last, texts = ranks - 1, [text_of(rank, ranks) for rank in range(ranks)]

    def segment(rank: int, text: str, before: str) -> list[Run]:
        source = inner(before, rank - 1) if rank else entry(text)
        if rank == last:
            return [Run("exit", text, source, at=rank - 1)]
        return [*([Run("entry", text)] if rank == 0 else []), Run("inner", text, source, at=rank)]

    def runs(rank: int) -> list[Run]:
        if last - rank > left:  # what this rank makes would come too late for the last of them
            return []
        if step == switch.first:
            return [run for earlier in range(rank + 1) for run in segment(earlier, texts[rank], texts[rank])]
        return segment(rank, texts[rank], texts[rank - 1])

    handed = [(inner(texts[rank], rank), rank, rank + 1) for rank in range(last) if last - rank <= left]
    return merged_step([runs(rank) for rank in range(ranks)], handed, last)
