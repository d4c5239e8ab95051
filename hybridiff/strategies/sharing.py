"""One evaluation of a branch, shared by the ranks that belong to it.

An MMDiT's tokens are divided: every rank has some rows of the image and some words of the text, and in every block it gathers
the keys and values of the others, so that the result is exact but for rounding. A U-Net is not divided: the first rank of a branch
evaluates it whole, the others wait. With one rank a branch it is the whole network in any case.
"""

from typing import Sequence

from hybridiff.schedule import Operation, Receive, Run, Send, Value, keys, prediction

TEXTS = ("uncond", "cond")


def text_of(rank: int, ranks: int) -> str:
    """The branch of a rank: the first half of the ranks is without the prompt."""
    return TEXTS[rank >= ranks // 2]


def on_a_slice(rank: int, ranks: int, blocks: int) -> list[Operation]:
    """One rank's slice of its branch, through all blocks; leaves its slice of the prediction."""
    text, of = text_of(rank, ranks), ranks // 2
    first = rank - rank % of  # of the branch's ranks
    at = rank - first + 1
    others = [other for other in range(first, first + of) if other != rank]
    operations: list[Operation] = [Run("begin", text, at=at, of=of)]
    for block in range(blocks):
        operations.append(Run("keys", text, at=at, of=of, block=block))
        operations += [Send(keys(text, at, of, block), to=other) for other in others]
        operations += [Receive(keys(text, other - first + 1, of, block), source=other) for other in others]
        operations.append(Run("attend", text, at=at, of=of, block=block))
    return [*operations, Run("end", text, at=at, of=of)]


def evaluate(ranks: int, blocks: int) -> list[list[Operation]]:
    """Both branches through the network on an even number of ranks; `blocks`: how many there are to share, 0 where the network cannot be divided."""
    if ranks > 2 and blocks:
        return [on_a_slice(rank, ranks, blocks) for rank in range(ranks)]
    return [[Run("whole", text_of(rank, ranks))] if rank % (ranks // 2) == 0 else [] for rank in range(ranks)]


def made_by(rank: int, ranks: int, blocks: int) -> Value | None:
    """What `evaluate` leaves on a rank: its branch's prediction, a slice of it, or nothing."""
    text, of = text_of(rank, ranks), ranks // 2
    if ranks > 2 and blocks:
        return prediction(text, rank % of + 1, of)
    return prediction(text) if rank % of == 0 else None


def exchange(made: Sequence[Value | None]) -> list[list[Operation]]:
    """Every rank sends what it has made to all others, then takes theirs."""
    lists: list[list[Operation]] = []
    for rank, own in enumerate(made):
        others = [other for other in range(len(made)) if other != rank]
        sends = [Send(own, to=other) for other in others if own]
        lists.append(sends + [Receive(made[other], source=other) for other in others if made[other]])
    return lists
