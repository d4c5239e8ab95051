"""What all transports share, and the one that plays every rank in one process.

Words between ranks are JSON, tensors are sent as they are. Set HYBRIDIFF_TRACE=1 to see every message; each then carries a label with
its step, name, shapes and dtypes, which is compared on arrival.
"""

import json
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hybridiff.errors import UsageError
from hybridiff.schedule import Name

TRACE = os.environ.get("HYBRIDIFF_TRACE", "0") == "1"
LABEL = 512  # bytes of a label
LONGEST = 2**26  # bytes of a word
Shapes = Sequence[tuple[torch.Size, torch.dtype]]


def trace(text: str) -> None:
    """One line on stderr, for HYBRIDIFF_TRACE=1."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def label(step: int, name: Name, shapes: Shapes) -> Tensor:
    """What a message must be, as bytes: uint8 [LABEL]."""
    text = f"step {step}: {name} {[(tuple(shape), str(dtype)) for shape, dtype in shapes]}"
    return torch.frombuffer(bytearray(text.encode().ljust(LABEL)), dtype=torch.uint8)


def encode(word: object) -> Tensor:
    """A word as JSON in bytes: uint8 [length]. UsageError where it is too long, TypeError where it is not None, a bool, number or str, or a list, tuple or dict with str keys of these."""
    text = json.dumps(word).encode()  # ASCII; lone surrogates become escapes, tuples lists
    if len(text) > LONGEST:
        raise UsageError(
            f"{len(text):,} bytes are too much for one word between ranks ({LONGEST:,} are the most): ask for fewer pictures in a run."
        )
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def decode(text: Tensor) -> object:
    """The word of `encode`: tuples have become lists. ValueError where it is none."""
    try:
        return json.loads(text.numpy().tobytes())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


class Transport:
    """What both transports share: who is here, the step that the loop is in, and the count of bytes."""

    rank, world = 0, 1  # within the replica
    replica, replicas = 0, 1
    step = -1  # outside of the loop
    route = ""  # how values travel, in words
    doing: object = (
        "the start"  # the phase or operation that this process is in, for what is said when it fails
    )

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()  # bytes by kind of result, sent by the ranks of this process
        self.last_words: Callable[[str], object] = sys.stderr.write  # what says why this process must end

    def count(self, name: Name, tensors: Sequence[Tensor], sender: int, to: int) -> None:
        """Add a message to the count."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.sent[name.what] += size
        if TRACE:
            trace(f"step {self.step}: rank {sender} -> rank {to}: {name}, {size} bytes")

    def forget(self) -> None:
        """A picture has broken off: drop the messages that nobody will take."""

    def synchronize(self) -> None:
        """The end of a step: wait until its messages are here, where `receive` only queues them."""

    def heartbeat(self) -> None:
        """Rank 0 lets the other replicas, which may have nothing left to make, see that this one lives; see `wait_for_all`."""
        if self.rank == 0 and self.replicas > 1:
            self.add("steps")


class LocalTransport(Transport):
    """One process plays every rank: a message waits in a queue until its receiver's turn."""

    def __init__(self) -> None:
        super().__init__()
        self.counters: Counter[str] = Counter()
        self.mail: dict[tuple[int, int], deque[tuple[Tensor, ...]]] = {}

    def arrived(self, sender: int, to: int) -> bool:
        """Whether a message waits."""
        return bool(self.mail.get((sender, to)))

    def send(self, name: Name, tensors: Sequence[Tensor], sender: int, to: int) -> None:
        self.count(name, tensors, sender, to)
        self.mail.setdefault((sender, to), deque()).append(tuple(tensors))

    def receive(self, name: Name, shapes: Shapes, sender: int, to: int) -> tuple[Tensor, ...]:
        """The oldest message from `sender`, which must be what the receiver would have made room for."""
        tensors = self.mail[sender, to].popleft()
        sent = [(tensor.shape, tensor.dtype) for tensor in tensors]
        assert sent == list(shapes), (
            f"rank {to} expected {name} as {shapes} from rank {sender}, which sent {sent}"
        )
        return tensors

    def forget(self) -> None:
        self.mail.clear()

    def open_channels(self, device: torch.device, wish: str = "auto") -> None:
        """Nothing to open within one process."""

    def divide(self, size: int) -> None:
        """One process is one replica, of whatever size."""

    def locate(self, device: torch.device | None) -> None:
        """There is one place."""

    def neighbours(self) -> tuple[int, int]:
        """Ranks on this machine, and on this rank's GPU."""
        return 1, 1

    def nccl_problem(self, size: int) -> str | None:
        """Why there is no NCCL."""
        return "there is one process, which sends nothing"

    def all_gather(self, word: object) -> list:
        """The words of all processes: of this one, as they are after the way between ranks."""
        return [decode(encode(word))]

    def all_gather_tensor(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes."""
        return [tensor]

    def add(self, name: str, amount: int = 1) -> int:
        """Add to a counter, which begins at 0; its value afterwards."""
        self.counters[name] += amount
        return self.counters[name]

    def wait_for_all(self) -> None:
        """Nobody to wait for."""

    def shutdown(self) -> None:
        """Nobody to leave."""

    def flush(self) -> Counter[str]:
        """Bytes by kind over all ranks since the last call."""
        sent, self.sent = self.sent, Counter()
        return sent
