"""One evaluation of a branch, shared by the ranks that belong to it.

An MMDiT's tokens are divided (sequence parallelism): every rank has some rows of the image and some tokens of the text, and an
all-gather in every unit gives it the keys and values of the others, so that the result is exact except for rounding. A network
whose tokens cannot be divided, such as a U-Net, is evaluated whole by the first rank of each branch, and the others wait.
With one rank a branch it is the whole network in any case.
"""

from collections.abc import Sequence

from hybridiff.partition import Partition
from hybridiff.schedule import Attend, Name, Operation, Project, Receive, Send, features, keys, prediction
from models.tape import Shard


def on_a_shard(rank: int, partition: Partition) -> list[Operation]:
    """One rank's shard of its branch, through all units; leaves its rows of the prediction."""
    branch, count = partition.branch_of(rank), partition.ranks // 2
    first = rank - rank % count  # of the branch's ranks
    shard = Shard(rank - first, count)
    others = [other for other in range(first, first + count) if other != rank]
    operations: list[Operation] = []
    for unit in range(partition.units):
        last = unit == partition.units - 1
        output = prediction(branch, shard) if last else features(branch, unit + 1, shard)
        operations.append(Project(branch, unit, shard))
        operations += [Send(keys(branch, unit, shard), to=other) for other in others]
        operations += [
            Receive(keys(branch, unit, Shard(other - first, count)), source=other) for other in others
        ]
        operations.append(Attend(branch, unit, shard, output))
    return operations


def divided(partition: Partition) -> bool:
    """Whether the ranks of a branch divide its tokens."""
    return partition.ranks > 2 and partition.shardable


def evaluate(partition: Partition) -> list[list[Operation]]:
    """Both branches through the network on an even number of ranks."""
    ranks = range(partition.ranks)
    if divided(partition):
        return [on_a_shard(rank, partition) for rank in ranks]
    first = [rank % (partition.ranks // 2) == 0 for rank in ranks]
    return [[partition.whole(partition.branch_of(rank))] if first[rank] else [] for rank in ranks]


def output_of(rank: int, partition: Partition) -> Name | None:
    """What `evaluate` leaves on a rank: its branch's prediction, a shard's rows of it, or nothing."""
    branch, count = partition.branch_of(rank), partition.ranks // 2
    if divided(partition):
        return prediction(branch, Shard(rank % count, count))
    return prediction(branch) if rank % count == 0 else None


def exchange(outputs: Sequence[Name | None]) -> list[list[Operation]]:
    """Every rank sends its output to all others, then receives theirs."""
    lists: list[list[Operation]] = []
    for rank, own in enumerate(outputs):
        others = [other for other in range(len(outputs)) if other != rank]
        sends = [Send(own, to=other) for other in others if own]
        receives = [Receive(name, source=other) for other in others if (name := outputs[other])]
        lists.append([*sends, *receives])
    return lists
