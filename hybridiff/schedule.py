"""Who computes what and who sends what to whom, as data.

A strategy turns (step, what has been measured so far) into a `StepPlan`: for every rank a list of operations. The same
lists are performed by the ranks, performed by one process that plays all ranks in turn, printed, checked (check.py), and added up
to bytes (cost.py). Results are kept under names in each rank's own store, so the lists show how old the input of each operation is: an
operation that comes before the `Receive` of a step reads what the step before left there.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hybridiff.switching import Stage, Switch
from models.tape import Shard, Span


class Name(NamedTuple):
    """What a result is called in a rank's store: what it is, and the branch ("cond" or "uncond") it was computed for."""

    # "prediction"; "features" that cross a position of the tape; "keys" of a unit; "discrepancy"; "guided"; and, never sent,
    # "state": what a rank keeps between the two halves of a unit
    what: str
    branch: str = ""
    extrapolated: bool = False  # to the present step, not computed in it
    at: int = 0  # features: the position; keys: the unit
    shard: Shard | None = None  # whose keys, features or rows of a prediction; None: all

    def __str__(self) -> str:
        name = f"{self.what}.{self.branch}".rstrip(".")
        where = {"features": f" at {self.at}", "keys": f" of unit {self.at}"}.get(self.what, "")
        return name + where + (f" {self.shard}" if self.shard else "") + " extrapolated" * self.extrapolated


DISCREPANCY, GUIDED = Name("discrepancy"), Name("guided")


def features(branch: str, at: int, shard: Shard | None = None) -> Name:
    """What crosses a position of the tape."""
    return Name("features", branch, at=at, shard=shard)


def keys(branch: str, unit: int, shard: Shard) -> Name:
    """Keys and values of a shard of the tokens in one unit."""
    return Name("keys", branch, at=unit, shard=shard)


def prediction(branch: str, shard: Shard | None = None) -> Name:
    """What the network predicts for a branch, noise or velocity: all of it or a shard's rows."""
    return Name("prediction", branch, shard=shard)


def extrapolated(name: Name) -> Name:
    """The same result, extrapolated from older ones."""
    return name._replace(extrapolated=True)


@dataclass(frozen=True)
class Run:
    """Run a span of the network for a branch, on the latents or on `source`; leaves `output`.

    Branch "both" runs both branches in one batch and leaves prediction("uncond") and prediction("cond"). The network is given the
    time of the step that lies `late` steps back.
    """

    span: Span
    branch: str
    output: Name
    source: Name | None = None
    late: int = 0

    @property
    def label(self) -> str:
        """The span in words: "whole network", "units 0-6"."""
        start, stop = self.span
        if self.source is None and self.output.what == "prediction":
            return "whole network"
        return f"units {start}-{stop - 1}" if stop - start > 1 else f"unit {start}"

    def __str__(self) -> str:
        when = f" of {self.late} step{'s' * (self.late > 1)} ago" if self.late else ""
        return f"run {self.label} ({self.branch})" + (f" on {self.source}{when}" if self.source else "")


@dataclass(frozen=True)
class Project:
    """The first half of a unit on a shard of the tokens: leaves the shard's keys and values, and keeps its queries.

    Reads the latents for unit 0, else the shard's features.
    """

    branch: str
    unit: int
    shard: Shard

    @property
    def output(self) -> Name:
        """What it leaves."""
        return keys(self.branch, self.unit, self.shard)

    def __str__(self) -> str:
        return f"project unit {self.unit} ({self.branch}) {self.shard}"


@dataclass(frozen=True)
class Attend:
    """The second half of a unit on a shard: reads the keys and values of all shards, leaves features or rows of the prediction."""

    branch: str
    unit: int
    shard: Shard
    output: Name

    def __str__(self) -> str:
        return f"attend in unit {self.unit} ({self.branch}) {self.shard}"


@dataclass(frozen=True)
class Send:
    """Hand a result to another rank without waiting for it."""

    name: Name
    to: int

    def __str__(self) -> str:
        return f"send {self.name} -> rank {self.to}"


@dataclass(frozen=True)
class Receive:
    """Wait for a result from another rank; it is the newest of that name then (older ones stay for `Extrapolate`)."""

    name: Name
    source: int

    def __str__(self) -> str:
        return f"receive {self.name} <- rank {self.source}"


@dataclass(frozen=True)
class Join:
    """Put the shards of a prediction together; leaves prediction(branch)."""

    branch: str
    shards: int

    def __str__(self) -> str:
        return f"join {prediction(self.branch)} of {self.shards} shards"


@dataclass(frozen=True)
class Measure:
    """Compute the denoising discrepancy (Eq. 1) of the two predictions in the store."""

    def __str__(self) -> str:
        return "measure discrepancy"


@dataclass(frozen=True)
class Extrapolate:
    """Continue a result along the line through its last two values to this step; leaves extrapolated(name).

    `steps` says which steps' latents the results belong to, the oldest first: with values v1, v2 of steps a, b and this step i,
    v2 + (i - b) / (b - a) * (v2 - v1). With a third in front the line is tried first: where the one through v0 and v1 would have missed v2 by
    more than |v2 - v1| (Euclidean norms), the last value is taken as it is.
    """

    name: Name
    steps: tuple[int, ...]

    def __str__(self) -> str:
        return f"extrapolate {self.name} from steps {', '.join(map(str, self.steps))}"


@dataclass(frozen=True)
class Guide:
    """Combine the predictions of the two branches by classifier-free guidance; leaves `GUIDED`."""

    cond: Name = prediction("cond")
    uncond: Name = prediction("uncond")

    def __str__(self) -> str:
        return "guide" if self == Guide() else f"guide {self.uncond} -> {self.cond}"


@dataclass(frozen=True)
class Step:
    """Let the sampler step along a prediction."""

    along: Name

    def __str__(self) -> str:
        return f"step along {self.along}"


Computation = Run | Project | Attend
Operation = Computation | Send | Receive | Join | Measure | Extrapolate | Guide | Step


@dataclass(frozen=True)
class StepPlan:
    """One step: the stage it belongs to and the operations of every rank, in order; the paper's switch, once it is decided."""

    stage: Stage
    operations: tuple[tuple[Operation, ...], ...]
    switch: Switch | None = None

    def runs(self, rank: int | None = None) -> list[Computation]:
        """What a rank, or any rank, runs of the network."""
        lists = self.operations if rank is None else [self.operations[rank]]
        return [
            operation
            for operations in lists
            for operation in operations
            if isinstance(operation, Computation)
        ]


class ScheduleError(Exception):
    """A schedule in which a message has no partner or ranks wait for each other for ever: an error of a strategy."""


def interleave(
    lists: Sequence[tuple[int, Sequence[Operation]]], arrived: Callable[[Receive, int], bool]
) -> Iterator[tuple[int, Operation]]:
    """An order in which one process can perform the lists of several (rank, operations).

    Each rank goes on until it must wait for a message that has not `arrived(receive, rank)`; then the next one's turn comes.
    Raises ScheduleError where all wait.
    """
    waiting = [(rank, deque(operations)) for rank, operations in lists]
    while any(todo for _, todo in waiting):
        progress = False
        for rank, todo in waiting:
            while todo and not (isinstance(todo[0], Receive) and not arrived(todo[0], rank)):
                yield rank, todo.popleft()
                progress = True
        if not progress:
            stuck = "; ".join(f"rank {rank} at '{todo[0]}'" for rank, todo in waiting if todo)
            raise ScheduleError(f"every rank waits for a message that nobody sends: {stuck}")
