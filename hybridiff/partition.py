"""How the ranks of a schedule share a network: spans of its tape, their owners, and the weights that a rank needs."""

from collections.abc import Sequence
from typing import NamedTuple

from hybridiff.schedule import Computation, Name, Run, features, prediction
from models.tape import Denoiser, Span

BRANCHES = ("uncond", "cond")


class Partition(NamedTuple):
    """Who runs what. The first half of the ranks belongs to the branch without the prompt, the second to the one with it."""

    ranks: int
    units: int  # of the whole tape
    spans: tuple[Span, ...]  # the tape in order
    owners: tuple[int, ...]  # the rank of each span
    shardable: bool  # whether a branch's tokens can be divided among its ranks

    def branch_of(self, rank: int) -> str:
        """The branch of a rank."""
        return BRANCHES[rank >= self.ranks // 2]

    def run(self, span: Span, branch: str, source: Name | None = None, late: int = 0) -> Run:
        """A span for a branch; reads the branch's own features where no source is named."""
        start, stop = span
        if start and source is None:
            source = features(branch, start)
        output = prediction(branch) if stop == self.units else features(branch, stop)
        return Run(span, branch, output, source, late)

    def whole(self, branch: str) -> Run:
        """The whole network for a branch, or "both" in one batch."""
        return self.run((0, self.units), branch)


def partition(
    denoiser: Denoiser, ranks: int, times: Sequence | None = None, nested: bool = False
) -> Partition:
    """A network over so many ranks; `times` and `nested` as in `models.tape.Denoiser.split`."""
    return Partition(ranks, denoiser.units, *denoiser.split(ranks, times, nested), denoiser.shardable)


def weights_needed(denoiser: Denoiser, runs: Sequence[Computation]) -> tuple[str, ...] | None:
    """Beginnings of the names of the parameters that these need; None for all."""
    spans = {run.span if isinstance(run, Run) else (run.unit, run.unit + 1) for run in runs}
    if {unit for span in spans for unit in range(*span)} == set(range(denoiser.units)):
        return None
    return tuple(sorted({name for span in spans for name in denoiser.parameters_of(span)}))
