"""A denoiser as a tape: a row of units, any span of which can be run by itself.

This is all that the rest of the project asks of a network (`Denoiser`). The units of a U-Net are its input blocks, the middle and
its output blocks; those of an MMDiT are its blocks. Whatever stands before the first unit goes with it, and whatever stands
after the last one with that.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Span = tuple[int, int]  # units [start, stop)
Size = tuple[int, int]  # height and width of the latents
Features = Tensor | tuple[Tensor, ...]  # what crosses a position between two units


class Split(NamedTuple):
    """A network divided among ranks: its spans, in order and without a gap, and the rank that owns each."""

    spans: tuple[Span, ...]
    owners: tuple[int, ...]


class Shard(NamedTuple):
    """A share of a branch's tokens: number `index`, from 0, of `count`."""

    index: int
    count: int

    def of(self, length: int) -> slice:
        """Its part of so many rows or tokens; the parts are as equal as can be."""
        return slice(length * self.index // self.count, length * (self.index + 1) // self.count)

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"


class Denoiser(Protocol):
    """The contract. Latents are (B, C, h, w), times t (B,), conditioning a NamedTuple whose first field is text (B, L, width)."""

    config: Any
    units: int
    most_ranks: int  # over how many ranks `split` can divide it
    shardable: bool  # whether `project` and `attend` are there

    def run(
        self, span: Span, x: Features, kept: dict[int, Tensor], t: Tensor, conditioning: Any, size: Size
    ) -> Features:
        """Units [start, stop) on `x`: latents where start = 0, else the features that crossed `start`.

        Returns the features that cross `stop`, or the prediction (B, C, h, w) where stop = units. `kept` holds what earlier units of
        the same step left for later ones, such as a U-Net's skips, and is changed in place.
        """

    def shapes(
        self, at: int, latents: torch.Size, text_tokens: int, shard: Shard | None = None
    ) -> tuple[torch.Size, ...]:
        """Shapes of the tensors that cross position `at`; at = units means the prediction, of all rows or of a shard's."""

    def split(
        self, ranks: int, times: Sequence[Sequence[float]] | None = None, nested: bool = False
    ) -> Split:
        """Spans and owners for so many ranks. `times[rank][unit]`: seconds, for devices that are not alike. `nested` (two ranks):
        rank 1 owns both ends and rank 0 the units between them. ValueError where it cannot be divided so."""

    def parameters_of(self, span: Span) -> tuple[str, ...]:
        """How the names of the parameters begin that a span needs."""

    def project(
        self, unit: int, x: Any, t: Tensor, conditioning: Any, size: Size, shard: Shard
    ) -> tuple[Any, tuple[Tensor, ...]]:
        """The first half of a unit on a shard of the tokens: what `attend` needs again, and the shard's keys and values.

        `x`: all latents for unit 0, else what `attend` returned for the unit before.
        """

    def attend(self, unit: int, state: Any, keys: Sequence[tuple[Tensor, ...]], size: Size) -> Any:
        """The second half, with the keys and values of all shards in order. Returns the shard's rows of the prediction after the last unit."""

    def parameters(self) -> Iterator[Tensor]:
        """Those of `torch.nn.Module`, which a network is; likewise `state_dict`."""

    def state_dict(self) -> Mapping[str, Tensor]: ...

    def key_shapes(
        self, unit: int, latents: torch.Size, text_tokens: int, shard: Shard
    ) -> tuple[torch.Size, ...]:
        """Shapes of a shard's keys and values."""


def spans_between(cuts: Sequence[int], units: int) -> tuple[Span, ...]:
    """The spans between cuts, from 0 to `units`."""
    return tuple(zip((0, *cuts), (*cuts, units)))


def best_cuts(times: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """Where to cut U units in N parts, none of them empty, so that the slowest part is as fast as can be: N - 1 positions.

    `times[part][unit]`: what a unit takes on the device of that part; N <= U. Of equally good cuts those with alike parts are taken.
    """
    parts, units = len(times), len(times[0])

    @cache
    def best(part: int, start: int) -> tuple[float, float, tuple[int, ...]]:
        """Of the parts from this one on, which begins at `start`: the slowest, the sum of squares, and the cuts."""
        if part == parts - 1:
            own = sum(times[part][start:])
            return own, own**2, ()
        choices = []
        for stop in range(start + 1, units - (parts - part - 1) + 1):
            own, (slowest, squares, cuts) = sum(times[part][start:stop]), best(part + 1, stop)
            choices.append((max(own, slowest), own**2 + squares, (stop, *cuts)))
        return min(choices)

    return best(0, 0)[2]
