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
    """The name of a result: what it is, and the text ("cond" or "uncond") under which it was computed."""

    what: str  # "entry", "inner": features that left that part; "prediction"; "discrepancy"; "guided"
    text: str = ""
    ahead: bool = False  # extrapolated to the present step, not computed in it

    def __str__(self) -> str:
        return f"{self.what}.{self.text}".rstrip(".") + (" ahead" if self.ahead else "")


DISCREPANCY, GUIDED = Value("discrepancy"), Value("guided")


def entry(text: str) -> Value:
    """Features that crossed from the entry to the inner part."""
    return Value("entry", text)


def inner(text: str) -> Value:
    """Features that crossed from the inner part to the exit."""
    return Value("inner", text)


def prediction(text: str) -> Value:
    """What the network predicts under a text: noise or velocity."""
    return Value("prediction", text)


def ahead(value: Value) -> Value:
    """The same result, extrapolated from older ones."""
    return value._replace(ahead=True)


@dataclass(frozen=True)
class Run:
    """Run a part of the network under a text.

    "whole" leaves prediction(text), with text "both" the predictions of both texts from one batch; "entry" leaves entry(text)
    and keeps the skips; "inner" reads `source` and leaves inner(text); "exit" reads `source` and the skips of the last
    entry under this text, and leaves prediction(text). The network is told the time of the step that lies `late` steps back.
    """

    part: str
    text: str
    source: Value | None = None
    late: int = 0

    def __str__(self) -> str:
        when = f" of {self.late} step{'s' * (self.late > 1)} ago" if self.late else ""
        return f"run {self.part}({self.text})" + (f" on {self.source}{when}" if self.source else "")


@dataclass(frozen=True)
class Send:
    """Hand a value to another rank without waiting for it."""

    value: Value
    to: int

    def __str__(self) -> str:
        return f"send {self.value} -> rank {self.to}"


@dataclass(frozen=True)
class Receive:
    """Wait for a value from another rank; it replaces the older value of that name."""

    value: Value
    source: int

    def __str__(self) -> str:
        return f"receive {self.value} <- rank {self.source}"


@dataclass(frozen=True)
class Measure:
    """Compute the denoising discrepancy (Eq. 1) of the two predictions in the store."""

    def __str__(self) -> str:
        return "measure discrepancy"


@dataclass(frozen=True)
class Extrapolate:
    """Continue a value along the line through its last two results to this step; leaves ahead(value).

    `made` says which steps' latents the two results belong to, the older first: with results v0, v1 of steps a, b and this step i,
    v1 + (i - b) / (b - a) * (v1 - v0). With one step in `made` the last result is taken as it is.
    """

    value: Value
    made: tuple[int, ...]

    def __str__(self) -> str:
        return f"extrapolate {self.value} from step{'s' * (len(self.made) - 1)} {', '.join(map(str, self.made))}"


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


Operation = Run | Send | Receive | Measure | Extrapolate | Guide | Step


@dataclass(frozen=True)
class StepPlan:
    """One step: the stage it belongs to and the operations of every rank, in order."""

    stage: Stage
    operations: tuple[tuple[Operation, ...], ...]


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


def bytes_sent(plan: StepPlan, sizes: dict[str, int]) -> Counter[str]:
    """Bytes of a step's messages by kind ("prediction", "entry", ...), given the bytes of one message of each kind."""
    total: Counter[str] = Counter()
    for operations in plan.operations:
        for operation in operations:
            if isinstance(operation, Send):
                total[operation.value.what] += sizes[operation.value.what]
    return total
