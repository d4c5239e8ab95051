"""When each operation began and ended, as measured, and how much memory each phase took.

Times are the host's, or the GPU's where the work is done there. Host memory is the resident set as the operating system counts it:
memory-mapped weights are in it, also where ranks share them.
"""

import sys
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from hybridiff.cost import Bar
from hybridiff.schedule import Attend, Operation, Project, Receive, Run, Send
from hybridiff.watch import Watch

EVERY = 0.02  # seconds between two looks at the resident set


def kind(operation: Operation) -> str:
    """What an operation's time counts as."""
    return {Run: "run", Project: "run", Attend: "run", Send: "send", Receive: "wait"}.get(
        type(operation), "other"
    )


class Profile(Watch):
    """Keeps when each operation began and ended, in seconds from the first step, and the highest memory of each phase.

    A send counts until it is posted, a receive until it is there. The system's own highest figure of memory is exact, but only grows:
    where a phase stays below an earlier one, the figure is the highest of looks every 20 ms.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.origin = self.mark()
        self.noted: list[tuple] = []
        self.phases: dict[str, dict[str, int]] = {}  # phase -> {"host": bytes, "gpu": bytes on CUDA}
        self.before, self.seen = 0, 0
        threading.Thread(target=look, args=(weakref.ref(self),), daemon=True).start()
        self.phase("start")

    def begin(self) -> None:
        self.origin = self.mark()

    def mark(self) -> "float | torch.cuda.Event":
        """This moment; on CUDA the moment at which the current stream comes to here, without waiting for it."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def note(self, rank: int, step: int, operation: Operation, begun) -> None:
        self.noted.append((rank, step, begun, self.mark(), operation))

    def since(self, mark) -> float:
        """Seconds from the first step to a mark that has been reached."""
        return mark - self.origin if isinstance(mark, float) else self.origin.elapsed_time(mark) / 1000

    def bars(self) -> list[Bar]:
        """Every operation; on CUDA the device must have been synchronized."""
        return [
            Bar(rank, step, self.since(a), self.since(b), kind(op), str(op))
            for rank, step, a, b, op in self.noted
        ]

    def phase(self, name: str) -> None:
        """Count the memory of everything since the last call to this phase."""
        now, highest = resident()
        here = {"host": highest if highest > self.before else max(now, self.seen)}
        if self.device.type == "cuda":
            here["gpu"] = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        old = self.phases.setdefault(name, here)
        self.phases[name] = {where: max(size, old[where]) for where, size in here.items()}
        self.before, self.seen = highest, 0

    def memory(self) -> dict:
        """{"peak": ..., "phases": {phase: ...}}, each of {"host": bytes, "gpu": bytes on CUDA}."""
        sizes = self.phases.values()
        peak = {where: max(size[where] for size in sizes) for where in next(iter(sizes))}
        return {"peak": peak, "phases": self.phases}


def totals(bars: Sequence[Bar]) -> dict[tuple[int, int], dict[str, float]]:
    """Seconds of every rank in every step, by what they went into: {(rank, step): {"compute": ..., "send": ..., "wait": ..., "other": ...}}."""
    names = {"run": "compute", "send": "send", "wait": "wait", "other": "other"}
    spent = defaultdict(lambda: dict.fromkeys(names.values(), 0.0))
    for bar in bars:
        spent[bar.rank, bar.step][names[bar.what]] += bar.end - bar.start
    return spent


def resident() -> tuple[int, int]:
    """Bytes of this process in memory: (now, at the highest since it began)."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return tuple(int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    except (OSError, KeyError):
        try:
            import resource
        except ImportError:  # Windows
            return 0, 0
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
        return highest, highest


def look(watch: weakref.ref) -> None:
    """Look at the resident set again and again, as long as somebody keeps the profile."""
    while (here := watch()) is not None:
        here.seen = max(here.seen, resident()[0])
        del here
        time.sleep(EVERY)
