"""The only file that calls torch.distributed: how ranks find each other, and how values travel between them.

`Mailbox` plays all ranks in one process; `Ranks` is the real thing under torchrun. Both count the bytes that they carry, by kind.
Each direction between two ranks is a lane, a process group of its own, so that a send may be posted early and never waits
behind a receive: with NCCL, messages of one lane run in order on a stream of their own. Set HYBRIDIFF_TRACE=1 to see every
message.
"""

import os
import sys
from collections import Counter, deque
from datetime import timedelta
from typing import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hybridiff.schedule import Value

TRACE = os.environ.get("HYBRIDIFF_TRACE", "0") == "1"
Shapes = Sequence[tuple[torch.Size, torch.dtype]]


def trace(text: str) -> None:
    """One line on stderr if HYBRIDIFF_TRACE=1."""
    if TRACE:
        print(text, file=sys.stderr, flush=True)


class Transport:
    """What both transports share: who is here, and the count of bytes."""

    rank, world = 0, 1

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()  # bytes by kind of value, sent by the ranks of this process

    def count(self, value: Value, tensors: Sequence[Tensor], sender: int, to: int) -> None:
        """Add a message to the count."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.sent[value.what] += size
        trace(f"rank {sender} -> rank {to}: {value}, {size} bytes")


class Mailbox(Transport):
    """One process plays every rank: a message waits in a queue until its receiver's turn."""

    def __init__(self) -> None:
        super().__init__()
        self.mail: dict[tuple[int, int], deque[tuple[Tensor, ...]]] = {}

    def arrived(self, sender: int, to: int) -> bool:
        """Whether a message waits."""
        return bool(self.mail.get((sender, to)))

    def send(self, value: Value, tensors: Sequence[Tensor], sender: int, to: int) -> None:
        self.count(value, tensors, sender, to)
        self.mail.setdefault((sender, to), deque()).append(tuple(tensors))

    def receive(self, value: Value, shapes: Shapes, sender: int, to: int) -> tuple[Tensor, ...]:
        return self.mail[sender, to].popleft()

    def open_lanes(self, device: torch.device) -> None:
        """Nothing to open within one process."""

    def gather(self, word: object) -> list:
        """The words of all processes: of this one."""
        return [word]

    def finish(self) -> Counter[str]:
        """Bytes by kind over all ranks."""
        return self.sent


class Ranks(Transport):
    """This process is one rank among several: gloo on CPU, NCCL where each rank has a GPU of its own.

    Where ranks share a GPU or NCCL is missing, tensors are staged through host memory and sent by gloo.
    """

    def __init__(self, rank: int, world: int, timeout: timedelta):
        super().__init__()
        self.rank, self.world, self.timeout = rank, world, timeout
        dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timeout)  # for words between the ranks
        self.under_way: deque[tuple[dist.Work, Tensor]] = deque()  # sends keep their tensors alive until they are done

    def open_lanes(self, device: torch.device) -> None:
        """Make the lanes for values that lie on `device`; every rank must call it."""
        own_gpu = int(os.environ.get("LOCAL_WORLD_SIZE", self.world)) <= torch.cuda.device_count()
        nccl = device.type == "cuda" and dist.is_nccl_available() and own_gpu
        self.backend = "nccl" if all(self.gather(nccl)) else "gloo"
        self.device = device
        self.wire = device if self.backend == "nccl" else torch.device("cpu")  # where values lie while they travel
        pairs = [(a, b) for a in range(self.world) for b in range(self.world) if a != b]
        self.lanes = {pair: dist.new_group(pair, timeout=self.timeout, backend=self.backend) for pair in pairs}

    def arrived(self, sender: int, to: int) -> bool:
        """Always: `receive` waits by itself."""
        return True

    def send(self, value: Value, tensors: Sequence[Tensor], sender: int, to: int) -> None:
        """Post the tensors to rank `to` and go on."""
        self.count(value, tensors, sender, to)
        while self.under_way and self.under_way[0][0].is_completed():
            self.under_way.popleft()
        for tensor in tensors:
            tensor = tensor.to(self.wire).contiguous()
            self.under_way.append((dist.isend(tensor, to, group=self.lanes[sender, to]), tensor))

    def receive(self, value: Value, shapes: Shapes, sender: int, to: int) -> tuple[Tensor, ...]:
        """Wait for tensors of these (shape, dtype) from rank `sender`."""
        tensors = tuple(torch.empty(shape, dtype=dtype, device=self.wire) for shape, dtype in shapes)
        for tensor in tensors:
            dist.recv(tensor, sender, group=self.lanes[sender, to])
        trace(f"rank {to} <- rank {sender}: {value}")
        return tuple(tensor.to(self.device) for tensor in tensors)

    def finish(self) -> Counter[str]:
        """Wait for the sends of this rank; bytes by kind over all ranks."""
        while self.under_way:
            self.under_way.popleft()[0].wait()
        total: Counter[str] = Counter()
        for count in self.gather(dict(self.sent)):
            total.update(count)
        return total

    def gather(self, word: object) -> list:
        """Every rank's small object, on every rank."""
        words: list = [None] * self.world
        dist.all_gather_object(words, word)
        return words


def place() -> tuple[int, int, int]:
    """(rank, ranks, local rank) from torchrun's environment; (0, 1, 0) without it."""
    env = os.environ
    return int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1)), int(env.get("LOCAL_RANK", 0))


def connect(timeout: timedelta = timedelta(minutes=5)) -> Transport:
    """The transport of this process: `Ranks` under torchrun with two ranks or more, else `Mailbox`."""
    rank, world, _ = place()
    return Ranks(rank, world, timeout) if world > 1 else Mailbox()


def disconnect() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
