"""Where to cut a network in segments, one a rank, and which weights a rank needs.

A network is a row of units, the smallest segments that there can be: a block of an MMDiT; of a U-Net, whose segments are rings, an input
block with its output block (and of the deepest with the middle).
"""

from functools import cache
from typing import Sequence

from hybridiff.schedule import Run, entry, inner
from models.mmdit import MMDiT
from models.unet import UNet


def best_cuts(times: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """Positions of the cuts between N segments of a network of U units, in order and none empty, so that the slowest segment is fastest.

    `times[s][u]`: what unit u takes on the device of segment s; N <= U. Where several cuts do, those with alike segments are preferred.
    """
    segments, units = len(times), len(times[0])

    @cache
    def best(segment: int, start: int) -> tuple[float, float, tuple[int, ...]]:
        """Of the segments from this one on, which begins at unit `start`: the slowest, the sum of squares, and the cuts."""
        if segment == segments - 1:
            own = sum(times[segment][start:])
            return own, own**2, ()
        choices = []
        for stop in range(start + 1, units - (segments - segment - 1) + 1):
            own, (slowest, squares, cuts) = sum(times[segment][start:stop]), best(segment + 1, stop)
            choices.append((max(own, slowest), own**2 + squares, (stop, *cuts)))
        return min(choices)

    return best(0, 0)[2]


def even(sizes: Sequence[float], segments: int) -> tuple[int, ...]:
    """The cuts for equal devices, from the sizes of the units."""
    return best_cuts([sizes] * segments)


def in_segments(net: UNet | MMDiT, text: str, segments: int) -> list[tuple[int, Run]]:
    """The whole network under a text as runs of its segments, each with the number of its segment, from 0."""
    last = segments - 1
    if isinstance(net, MMDiT):
        middle = [
            (at, Run("inner", text, inner(text, at - 1) if at else entry(text), at=at)) for at in range(last)
        ]
        return [
            (0, Run("entry", text)),
            *middle,
            (last, Run("exit", text, inner(text, last - 1), at=last - 1)),
        ]
    return [
        ({"entry": 0, "exit": 0, "inner": last}.get(run.part, run.at), run)
        for run in all_rings(text, segments)
    ]


def all_rings(text: str, segments: int) -> list[Run]:
    """The whole of a nested network, ring by ring."""
    rings = range(1, segments - 1)
    down = [Run("down", text, entry(text, ring - 1), at=ring) for ring in rings]
    up = [Run("up", text, inner(text, ring), at=ring) for ring in reversed(rings)]
    middle = Run("inner", text, entry(text, segments - 2), at=segments - 2)
    return [Run("entry", text), *down, middle, *up, Run("exit", text, inner(text))]


def balanced(net: UNet | MMDiT, times: Sequence[Sequence[float]]) -> tuple:
    """The cuts for devices that take `times[rank][unit]`: segments go to the ranks in order, rings from the last rank inwards."""
    order = list(times) if isinstance(net, MMDiT) else list(times)[::-1]
    return net.cuts(best_cuts(order))


def weights_needed(net: UNet | MMDiT, cuts: Sequence, runs: Sequence[Run]) -> tuple[str, ...] | None:
    """Beginnings of the names of the parameters that these runs need; None where it may be all. Only a U-Net's rings need less."""
    if isinstance(net, MMDiT) or any(run.part == "whole" for run in runs):
        return None
    rings = {
        (cuts[run.at], len(net.input_blocks))
        if run.part == "inner"
        else (cuts[run.at - 1] if run.at else 0, cuts[run.at])
        for run in runs
    }
    return tuple(sorted({name for ring in rings for name in net.names(*ring)}))
