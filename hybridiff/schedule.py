"""Who computes what and who sends what to whom, as data.

A strategy turns (step, what has been measured so far) into a `StepPlan`: for every rank a list of operations. The same
lists are performed by the ranks, performed by one process that plays all ranks in turn, printed, checked, and added up to
bytes. Values are kept under names in each rank's own store, so that the age of what an operation reads can be seen: an
operation that comes before the `Receive` of a step reads what the step before left there.
"""

from collections import Counter, deque
from dataclasses import dataclass
from typing import Callable, Iterator, NamedTuple, Sequence

from hybridiff.switching import Stage


class Value(NamedTuple):
    """The name of a result: what it is, and the text ("cond" or "uncond") under which it was computed.

    Where the network is cut several times, `at` is the number of the cut that features cross, from 0. Where the tokens are
    divided into `of` slices, `at` is the slice that keys or a prediction belong to, from 1; `of` = 0 means all tokens.
    """

    # "entry", "inner": features that cross a cut inwards, outwards; "keys" of a block; "prediction"; "discrepancy"; "guided"; never sent:
    # "skips", what a rank keeps between two parts; "slice", its tokens between two blocks
    what: str
    text: str = ""
    ahead: bool = False  # extrapolated to the present step, not computed in it
    at: int = 0
    of: int = 0
    block: int = 0

    def __str__(self) -> str:
        name = f"{self.what}{'' if self.of else self.at or ''}.{self.text}".rstrip(".")
        name += f" of block {self.block}" if self.what == "keys" else ""
        return name + (" ahead" if self.ahead else "") + (f" {self.at}/{self.of}" if self.of else "")


DISCREPANCY, GUIDED = Value("discrepancy"), Value("guided")


def entry(text: str, at: int = 0) -> Value:
    """Features that crossed a cut inwards: from the entry to the inner part."""
    return Value("entry", text, at=at)


def inner(text: str, at: int = 0) -> Value:
    """Features that crossed a cut outwards: from the inner part to the exit."""
    return Value("inner", text, at=at)


def keys(text: str, at: int, of: int, block: int) -> Value:
    """Keys and values of one slice of the tokens in one block."""
    return Value("keys", text, at=at, of=of, block=block)


def prediction(text: str, at: int = 0, of: int = 0) -> Value:
    """What the network predicts under a text, noise or velocity: all of it or one slice's rows."""
    return Value("prediction", text, at=at, of=of)


def ahead(value: Value) -> Value:
    """The same result, extrapolated from older ones."""
    return value._replace(ahead=True)


@dataclass(frozen=True)
class Run:
    """Run a part of the network under a text.

    "whole" leaves prediction(text), with text "both" the predictions of both texts from one batch; "entry" leaves entry(text)
    and keeps the skips; "inner" reads `source` and leaves inner(text); "exit" reads `source` and the skips of the last
    entry under this text, and leaves prediction(text). The network is told the time of the step that lies `late` steps back.

    With several cuts, these leave and read the features of cut `at`, and a ring lies between the cuts at - 1 and at: "down" reads
    `source` and leaves entry(text, at), "up" reads `source` and the ring's skips and leaves inner(text, at - 1).

    On slice `at` of `of` of the tokens: "begin" embeds it; "keys" leaves keys(text, at, of, block); "attend" reads the keys of all slices;
    "end" leaves prediction(text, at, of).
    """

    part: str
    text: str
    source: Value | None = None
    late: int = 0
    at: int = 0
    of: int = 0
    block: int = 0

    @property
    def unit(self) -> str:
        """What is run, whatever the text: "whole", "entry", "down1", "keys 1/2 of block 3"."""
        if not self.of:
            return f"{self.part}{self.at or ''}"
        block = f" of block {self.block}" if self.part in ("keys", "attend") else ""
        return f"{self.part} {self.at}/{self.of}{block}"

    @property
    def leaves(self) -> Value:
        """What it leaves in the store ("whole" under "both": prediction("both") stands for the predictions of both texts)."""
        if self.part == "up":
            return inner(self.text, self.at - 1)
        if self.part in ("inner", "keys"):
            return Value(self.part, self.text, at=self.at, of=self.of, block=self.block)
        if self.part in ("entry", "down"):
            return entry(self.text, self.at)
        return (
            Value("slice", self.text)
            if self.part in ("begin", "attend")
            else prediction(self.text, self.at if self.of else 0, self.of)
        )

    def __str__(self) -> str:
        when = f" of {self.late} step{'s' * (self.late > 1)} ago" if self.late else ""
        return f"run {self.unit}({self.text})" + (f" on {self.source}{when}" if self.source else "")


@dataclass(frozen=True)
class Send:
    """Hand a value to another rank without waiting for it."""

    value: Value
    to: int

    def __str__(self) -> str:
        return f"send {self.value} -> rank {self.to}"


@dataclass(frozen=True)
class Receive:
    """Wait for a value from another rank; it is the newest of that name then (older ones stay for `Extrapolate`)."""

    value: Value
    source: int

    def __str__(self) -> str:
        return f"receive {self.value} <- rank {self.source}"


@dataclass(frozen=True)
class Join:
    """Put the slices of a prediction together; leaves prediction(text)."""

    text: str
    of: int

    def __str__(self) -> str:
        return f"join {prediction(self.text)} of {self.of} slices"


@dataclass(frozen=True)
class Measure:
    """Compute the denoising discrepancy (Eq. 1) of the two predictions in the store."""

    def __str__(self) -> str:
        return "measure discrepancy"


@dataclass(frozen=True)
class Extrapolate:
    """Continue a value along the line through its last two results to this step; leaves ahead(value).

    `made` says which steps' latents the results belong to, the oldest first: with results v1, v2 of steps a, b and this step i,
    v2 + (i - b) / (b - a) * (v2 - v1). With a third in front the line is tried first: where the one through v0 and v1 would have missed v2 by
    more than |v2 - v1| (Euclidean norms), the last result is taken as it is.
    """

    value: Value
    made: tuple[int, ...]

    def __str__(self) -> str:
        return f"extrapolate {self.value} from steps {', '.join(map(str, self.made))}"


@dataclass(frozen=True)
class Guide:
    """Combine the predictions of the two branches by classifier-free guidance; leaves `GUIDED`."""

    cond: Value = prediction("cond")
    uncond: Value = prediction("uncond")

    def __str__(self) -> str:
        return "guide" if self == Guide() else f"guide {self.uncond} -> {self.cond}"


@dataclass(frozen=True)
class Step:
    """Let the sampler step along a value."""

    along: Value

    def __str__(self) -> str:
        return f"step along {self.along}"


Operation = Run | Send | Receive | Join | Measure | Extrapolate | Guide | Step


@dataclass(frozen=True)
class StepPlan:
    """One step: the stage it belongs to and the operations of every rank, in order."""

    stage: Stage
    operations: tuple[tuple[Operation, ...], ...]

    def runs(self, rank: int | None = None) -> list[Run]:
        """What a rank, or any rank, runs of the network."""
        lists = self.operations if rank is None else [self.operations[rank]]
        return [operation for operations in lists for operation in operations if isinstance(operation, Run)]


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


def check(plan: StepPlan) -> None:
    """Raise ScheduleError unless each send meets its receive in order, nobody waits for ever and every rank steps once."""
    mail: dict[tuple[int, int], deque[Value]] = {}  # (sender, receiver) -> values under way

    def arrived(receive: Receive, rank: int) -> bool:
        return bool(mail.get((receive.source, rank)))

    for rank, operation in interleave(list(enumerate(plan.operations)), arrived):
        if isinstance(operation, Send):
            if not 0 <= operation.to < len(plan.operations) or operation.to == rank:
                raise ScheduleError(f"rank {rank}: '{operation}' goes to no other rank")
            mail.setdefault((rank, operation.to), deque()).append(operation.value)
        elif isinstance(operation, Receive):
            value = mail[operation.source, rank].popleft()
            if value != operation.value:
                raise ScheduleError(f"rank {rank}: '{operation}' meets {value}")
    left = [f"{value} from rank {a} to rank {b}" for (a, b), values in mail.items() for value in values]
    if left:
        raise ScheduleError(f"sent but never received: {', '.join(left)}")
    for rank, operations in enumerate(plan.operations):
        if sum(isinstance(operation, Step) for operation in operations) != 1:
            raise ScheduleError(f"rank {rank} does not step exactly once")


def bytes_sent(plan: StepPlan, size: Callable[[Value], int]) -> Counter[str]:
    """Bytes of a step's messages by kind ("prediction", "entry", ...), given the bytes of a value."""
    total: Counter[str] = Counter()
    for operations in plan.operations:
        for operation in operations:
            if isinstance(operation, Send):
                total[operation.value.what] += size(operation.value)
    return total
