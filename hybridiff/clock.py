"""When each operation began and ended, as measured: on the host's clock, or on the GPU's where the work is done there."""

import time
from collections import defaultdict
from typing import NamedTuple, Sequence

import torch

from hybridiff.schedule import Attend, Operation, Project, Receive, Run, Send


class Bar(NamedTuple):
    """A stretch of one rank's time."""

    rank: int
    step: int
    start: float
    end: float
    what: str  # "run", "send", "wait" (a receive) or "other" (measure, guide, step)
    label: str  # the operation


def kind(operation: Operation) -> str:
    """What an operation's time counts as."""
    return {Run: "run", Project: "run", Attend: "run", Send: "send", Receive: "wait"}.get(
        type(operation), "other"
    )


class Clock:
    """Measures operations; seconds count from its making. A send counts until it is posted, a receive until it is there."""

    def __init__(self, device: torch.device):
        self.device = device
        self.origin = self.mark()
        self.noted: list[tuple] = []

    def mark(self) -> "float | torch.cuda.Event":
        """This moment; on CUDA the moment at which the current stream comes to here, without waiting for it."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def note(self, rank: int, step: int, operation: Operation, start) -> None:
        """Keep that this operation went on from `start`, a mark, until now."""
        self.noted.append((rank, step, start, self.mark(), operation))

    def since(self, mark) -> float:
        """Seconds from the clock's making to a mark that has been reached."""
        return mark - self.origin if isinstance(mark, float) else self.origin.elapsed_time(mark) / 1000

    def take(self) -> list[Bar]:
        """The bars noted since the last call; on CUDA the device must have been synchronized."""
        noted, self.noted = self.noted, []
        return [
            Bar(rank, step, self.since(a), self.since(b), kind(op), str(op)) for rank, step, a, b, op in noted
        ]


def totals(bars: Sequence[Bar]) -> dict[tuple[int, int], dict[str, float]]:
    """Seconds of every rank in every step, by what they went into: {(rank, step): {"compute": ..., "send": ..., "wait": ..., "other": ...}}."""
    names = {"run": "compute", "send": "send", "wait": "wait", "other": "other"}
    spent = defaultdict(lambda: dict.fromkeys(names.values(), 0.0))
    for bar in bars:
        spent[bar.rank, bar.step][names[bar.what]] += bar.end - bar.start
    return spent
