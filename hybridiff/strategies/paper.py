"""The three stages as published (paper, Sec. 4, and the released code; more than two ranks: Sec. 4.5, layer-wise).

Warm-up and fully-connecting are condition partitioning. In between, steps `first..tau2` run as a pipeline: the network is cut into
spans, and each rank runs only its own, for its branch and at the time of the present step: the rank that reads the latents on the present
ones, all others on features that their neighbours computed one step earlier. These steps have one prediction, which goes to all ranks,
and no guidance: that is what the released code computes, and where its quality goes.

Two ranks, U-Net (spans 0, 1, 2 owned by ranks 1, 0, 1). In step i rank 1 runs e_i = span 0 of the latents x_i and span 2 on h_(i-1), with
the prompt: the step's prediction. Rank 0 runs h_i = span 1 on e_(i-1) without it. So the inner features come from the latents of step i - 2.

Two ranks, MMDiT (spans 0, 1 owned by ranks 0, 1). In step i rank 0 runs h_i = span 0 of x_i without the prompt, rank 1 span 1 on h_(i-1)
with it: the step's prediction, from the latents of step i - 1. (The released code freezes the tokens at the first of these steps, by an index
that is off by one; we follow the intent.) The tokens of the text come with them, so a later rank adds only its pooled vector.
"""

from collections.abc import Sequence

from hybridiff.partition import BRANCHES, Partition
from hybridiff.schedule import Name, Operation, Receive, Run, Send, Step, StepPlan, features, prediction
from hybridiff.strategies.condition import guided_step
from hybridiff.strategies.sequence_parallel import evaluate, exchange
from hybridiff.strategies.settings import Settings
from hybridiff.switching import find_switch

PREDICTION = prediction("cond")  # the one prediction of a pipelined step
Runs = list[list[Run]]  # of every rank
Transfer = tuple[Name, int, int]  # features, the rank that computes them, the rank that reads them


def paper(step: int, history: Sequence[float | None], settings: Settings, partition: Partition) -> StepPlan:
    """The first pipelined step fills the pipeline; what would come too late for the last one is neither computed nor sent."""
    switch = find_switch(history, settings.rule)
    stage = switch.stage(step) if switch else "warm-up"
    if switch is None or stage != "parallelism":
        return StepPlan(stage, guided_step(evaluate(partition), partition, share=switch is None), switch)
    left = min(switch.tau2, settings.steps - 1) - step  # pipelined steps after this one
    in_time = [steps <= left for steps in steps_to_prediction(partition.owners)]
    if step == switch.first:
        runs, computing = filling_runs(partition, in_time)
    else:
        runs, computing = pipelined_runs(partition, in_time), list(partition.owners)
    transfers: list[Transfer] = []
    for j, (_, stop) in enumerate(partition.spans[:-1]):
        sender, receiver = computing[j], partition.owners[j + 1]
        if sender != receiver and in_time[j]:
            branch = partition.branch_of(partition.owners[j])
            transfers.append((features(branch, stop), sender, receiver))
    return StepPlan(stage, with_messages(runs, transfers, predicting=computing[-1]), switch)


def steps_to_prediction(owners: Sequence[int]) -> list[int]:
    """Of every span, how many steps later its features first have a part in a prediction: 0 for the last one, which makes it.

    The rank that owns the next span reads them one step later, and uses them in whichever of its spans gets there soonest.
    """
    steps = [0] * len(owners)
    for j in reversed(range(len(owners) - 1)):
        steps[j] = 1 + min(steps[k] for k in range(j + 1, len(owners)) if owners[k] == owners[j + 1])
    return steps


def pipelined_runs(partition: Partition, in_time: Sequence[bool]) -> Runs:
    """Every rank runs its own spans, on what is in its store when the step begins."""
    runs: Runs = []
    for rank in range(partition.ranks):
        own = [j for j, owner in enumerate(partition.owners) if owner == rank]
        needed = own if any(in_time[j] for j in own) else []
        runs.append([run_span(partition, j) for j in needed])
    return runs


def run_span(partition: Partition, j: int) -> Run:
    """Span j for its owner's branch, on the features of the span before it, which may be the other branch's."""
    branch, span = partition.branch_of(partition.owners[j]), partition.spans[j]
    before = features(partition.branch_of(partition.owners[j - 1]), span[0]) if j else None
    return partition.run(span, branch, before)


def filling_runs(partition: Partition, in_time: Sequence[bool]) -> tuple[Runs, list[int]]:
    """The first rank of each branch runs the network, for its own branch, as far as a span of that branch is needed.

    Returns the runs, and for every span the rank that computes its features now.
    """
    leaders = {branch: rank for rank, branch in ((0, BRANCHES[0]), (partition.ranks // 2, BRANCHES[1]))}
    branches = [partition.branch_of(owner) for owner in partition.owners]
    runs: Runs = [[] for _ in range(partition.ranks)]
    for branch, rank in leaders.items():
        needed = [j for j, own in enumerate(branches) if own == branch and in_time[j]]
        runs[rank] = [partition.run(span, branch) for span in partition.spans[: max(needed, default=-1) + 1]]
    return runs, [leaders[branch] for branch in branches]


def with_messages(
    runs: Runs, transfers: Sequence[Transfer], predicting: int
) -> tuple[tuple[Operation, ...], ...]:
    """Features leave as soon as they are there and are received at the end, to be read in the next step; all step along one prediction."""
    lists: list[tuple[Operation, ...]] = []
    outputs = [PREDICTION if rank == predicting else None for rank in range(len(runs))]
    for rank, (own, swap) in enumerate(zip(runs, exchange(outputs))):
        receiver_of = {name: receiver for name, sender, receiver in transfers if sender == rank}
        computed: list[Run | Send] = []
        for run in own:
            computed.append(run)
            if run.output in receiver_of:
                computed.append(Send(run.output, to=receiver_of[run.output]))
        received = [Receive(name, sender) for name, sender, receiver in transfers if receiver == rank]
        messages = (*swap, *received) if rank == predicting else (*received, *swap)
        lists.append((*computed, *messages, Step(PREDICTION)))
    return tuple(lists)
