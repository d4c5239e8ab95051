"""The only file that calls torch.distributed: how ranks find each other, and how values travel between them.

`Mailbox` plays all ranks in one process; `Ranks` is the real thing under torchrun. Both count the bytes that they carry, by kind.
Each direction between two ranks is a lane, a process group of its own, so that a send may be posted early and never waits
behind a receive: with NCCL, messages of one lane run in order on a stream of their own. Set HYBRIDIFF_TRACE=1 to see every
message; each then carries a label with its step, name, shapes and dtypes, which is compared on arrival.
"""

import os
import pickle
import sys
import threading
from collections import Counter, deque
from contextlib import contextmanager
from datetime import timedelta
from typing import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hybridiff.ending import say
from hybridiff.errors import UsageError
from hybridiff.schedule import Value

TRACE = os.environ.get("HYBRIDIFF_TRACE", "0") == "1"
LABEL = 512  # bytes of a label
Shapes = Sequence[tuple[torch.Size, torch.dtype]]


def trace(text: str) -> None:
    """One line on stderr if HYBRIDIFF_TRACE=1."""
    if TRACE:
        print(text, file=sys.stderr, flush=True)


class PeerLost(Exception):
    """Another rank has ended, or was silent for longer than the timeout. The message names it, the step and what was awaited."""


def label(step: int, value: Value, shapes: Shapes) -> Tensor:
    """What a message must be, as bytes: uint8 [LABEL]."""
    text = f"step {step}: {value} {[(tuple(shape), str(dtype)) for shape, dtype in shapes]}"
    return torch.frombuffer(bytearray(text.encode().ljust(LABEL)), dtype=torch.uint8)


class Transport:
    """What both transports share: who is here, the step that the loop is in, and the count of bytes."""

    rank, world = 0, 1
    step = -1  # outside of the loop
    doing: object = "the start"  # the phase or operation that this process is in, for what is said when it fails

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
        try:
            with self.waiting("all ranks to start"):
                dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timeout)  # for words between the ranks
        except PeerLost as lost:
            if problem := no_meeting(lost.__cause__):
                raise UsageError(f"rank {rank} cannot meet the others: {problem}") from None
            raise
        self.under_way: deque[tuple[dist.Work, Tensor]] = deque()  # sends keep their tensors alive until they are done

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """PeerLost, in words, where torch.distributed gives up; where it does not, this process ends a little later."""
        late = threading.Timer(self.timeout.total_seconds() + 3, self.end, [what])
        late.daemon = True
        late.start()
        try:
            yield
        except (RuntimeError, ValueError) as error:  # gloo's and NCCL's errors are RuntimeErrors
            silent = "imed out" in str(error) or "imeout" in str(error)
            seconds = f"{self.timeout.total_seconds():g}"
            why = f"nothing came for {seconds} seconds (--timeout)" if silent else "the other side has ended"
            raise PeerLost(f"rank {self.rank} waited for {what}{self.where()}, but {why}.") from error
        finally:
            late.cancel()

    def end(self, what: str) -> None:
        """The last resort, in a thread of its own: some waits of torch.distributed know no timeout, such as for a stopped rank 0 at the start."""
        say(f"rank {self.rank} waited for {what}{self.where()}, but nothing came for {self.timeout.total_seconds():g} seconds (--timeout).", error=True)
        os._exit(1)

    def where(self) -> str:
        """The step or the phase, in words."""
        return f" in step {self.step}" if self.step >= 0 else f" ({self.doing})"

    def open_lanes(self, device: torch.device) -> None:
        """Make the lanes for values that lie on `device`; every rank must call it."""
        own_gpu = int(os.environ.get("LOCAL_WORLD_SIZE", self.world)) <= torch.cuda.device_count()
        nccl = device.type == "cuda" and dist.is_nccl_available() and own_gpu
        self.backend = "nccl" if all(self.gather(nccl)) else "gloo"
        self.device = device
        self.wire = device if self.backend == "nccl" else torch.device("cpu")  # where values lie while they travel
        pairs = [(a, b) for a in range(self.world) for b in range(self.world) if a != b]
        with self.waiting("the other ranks to connect"):
            self.lanes = {pair: dist.new_group(pair, timeout=self.timeout, backend=self.backend) for pair in pairs}

    def arrived(self, sender: int, to: int) -> bool:
        """Always: `receive` waits by itself."""
        return True

    def send(self, value: Value, tensors: Sequence[Tensor], sender: int, to: int) -> None:
        """Post the tensors to rank `to` and go on."""
        self.count(value, tensors, sender, to)
        while self.under_way and self.under_way[0][0].is_completed():
            self.under_way.popleft()
        if TRACE:
            tensors = [label(self.step, value, [(tensor.shape, tensor.dtype) for tensor in tensors]), *tensors]
        for tensor in tensors:
            tensor = tensor.to(self.wire).contiguous()
            with self.waiting(f"rank {to} to take {value}"):
                self.under_way.append((dist.isend(tensor, to, group=self.lanes[sender, to]), tensor))

    def receive(self, value: Value, shapes: Shapes, sender: int, to: int) -> tuple[Tensor, ...]:
        """Wait for tensors of these (shape, dtype) from rank `sender`. PeerLost if it has ended or is silent for too long."""
        if TRACE:
            told, expected = torch.empty(LABEL, dtype=torch.uint8, device=self.wire), label(self.step, value, shapes)
            with self.waiting(f"{value} from rank {sender}"):
                dist.recv(told, sender, group=self.lanes[sender, to])
            if not torch.equal(told.cpu(), expected):
                said, meant = (bytes(text.tolist()).decode().rstrip() for text in (told.cpu(), expected))
                raise PeerLost(f"rank {to} expected '{meant}' from rank {sender}, which sent '{said}'.")
        tensors = tuple(torch.empty(shape, dtype=dtype, device=self.wire) for shape, dtype in shapes)
        for tensor in tensors:
            with self.waiting(f"{value} from rank {sender}"):
                dist.recv(tensor, sender, group=self.lanes[sender, to])
        trace(f"rank {to} <- rank {sender}: {value}")
        return tuple(tensor.to(self.device) for tensor in tensors)

    def finish(self) -> Counter[str]:
        """Wait for the sends of this rank; bytes by kind over all ranks."""
        while self.under_way:
            with self.waiting("its messages to be taken"):
                self.under_way.popleft()[0].wait()
        total: Counter[str] = Counter()
        for count in self.gather(dict(self.sent)):
            total.update(count)
        return total

    def gather(self, word: object) -> list:
        """Every rank's small object, on every rank."""
        told = torch.frombuffer(bytearray(pickle.dumps(word)), dtype=torch.uint8)
        words, sends = [word] * self.world, []
        others = [rank for rank in range(self.world) if rank != self.rank]  # one by one, so that it is known whose word does not come
        for rank in others:
            with self.waiting(f"rank {rank} to take a word"):
                sends.append([dist.isend(tensor, rank) for tensor in (torch.tensor([len(told)]), told)])
        for rank in others:
            size = torch.zeros(1, dtype=torch.int64)
            with self.waiting(f"a word from rank {rank}"):
                dist.recv(size, rank)
                theirs = torch.empty(int(size), dtype=torch.uint8)
                dist.recv(theirs, rank)
            words[rank] = pickle.loads(theirs.numpy().tobytes())
        for rank, works in zip(others, sends):
            with self.waiting(f"rank {rank} to take a word"):
                for work in works:
                    work.wait()
        return words


def no_meeting(error: BaseException) -> str | None:
    """What is wrong with the place where the ranks shall meet, as far as torch.distributed's error tells; None where a rank is missing or has ended."""
    told, address = str(error), ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if "EADDRINUSE" in told or "in use" in told:
        return f"{address} is taken; give torchrun another --master_port, or --standalone."
    if "gai error" in told or "resolve" in told or "EADDRNOTAVAIL" in told:
        return f"there is no machine {address}; see --master_addr of torchrun."
    if isinstance(error, ValueError):
        return f"{address} is no place to meet (MASTER_ADDR, MASTER_PORT); start them by torchrun."
    return None


def place() -> tuple[int, int, int]:
    """(rank, ranks, local rank) from torchrun's environment; (0, 1, 0) without it."""
    told = [os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))]
    if not all(number.isdecimal() for number in told) or int(told[0]) >= int(told[1]):
        raise UsageError("RANK, WORLD_SIZE, LOCAL_RANK in the environment are {}, {}, {}: start the ranks by torchrun.".format(*map(ascii, told)))
    return tuple(map(int, told))


def connect(timeout: timedelta = timedelta(minutes=10)) -> Transport:
    """The transport of this process: `Ranks` under torchrun with two ranks or more, else `Mailbox`."""
    rank, world, _ = place()
    return Ranks(rank, world, timeout) if world > 1 else Mailbox()


def disconnect() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
