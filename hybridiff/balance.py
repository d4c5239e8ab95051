"""Where to cut a network, so that the slowest of its segments takes as little time as possible."""

from functools import cache
from typing import Sequence


def best_cuts(times: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """Positions of the cuts between N segments of a network of U units, in order and none empty, so that the slowest segment is fastest.

    `times[s][u]`: what unit u takes on the device of segment s. Among equals the one whose later segments are the least slow; N <= U.
    """
    segments, units = len(times), len(times[0])

    @cache
    def best(segment: int, start: int) -> tuple[float, tuple[int, ...]]:
        """The slowest of the segments from this one on, which begins at unit `start`, and their cuts."""
        if segment == segments - 1:
            return sum(times[segment][start:]), ()
        choices = []
        for stop in range(start + 1, units - (segments - segment - 1) + 1):
            slowest, cuts = best(segment + 1, stop)
            choices.append((max(sum(times[segment][start:stop]), slowest), (stop, *cuts)))
        return min(choices)

    return best(0, 0)[1]


def even(sizes: Sequence[float], segments: int) -> tuple[int, ...]:
    """The cuts for equal devices, from the sizes of the units."""
    return best_cuts([sizes] * segments)
