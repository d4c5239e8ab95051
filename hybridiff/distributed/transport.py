"""How values and words travel between ranks; with process_group.py the only file that calls torch.distributed.

`LocalTransport` (local.py) plays all ranks in one process; `TorchTransport` is the real thing under torchrun. Both count the bytes that they carry.
Ranks that make one picture together are a replica, and count from 0 within it; all ranks are one replica until `divide` makes several.
Each direction between two ranks is a channel, a process group of its own, so that a send may be posted early and never waits
behind a receive: with NCCL, messages of one channel run in order on a stream of their own.
"""

import itertools
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from hybridiff.distributed.local import (
    LABEL,
    LONGEST,
    TRACE,
    LocalTransport,
    Shapes,
    Transport,
    decode,
    encode,
    label,
    trace,
)
from hybridiff.distributed.process_group import (
    AtMost,
    Place,
    cause,
    join,
    meeting_place,
    no_answer,
    no_meeting,
    no_nccl,
    this_place,
)
from hybridiff.errors import PeerLost, SharedError, UsageError
from hybridiff.schedule import Name


class Wait(AtMost):
    """A wait of `ranks` for others."""

    def __init__(self, ranks: "TorchTransport", what: str, why: Callable[[], str | None]):
        super().__init__(ranks.timeout.total_seconds() + 3, self.late)
        self.ranks, self.what, self.why = ranks, what, why

    def late(self) -> None:
        self.ranks.end(self.what, self.why())

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        super().__exit__()
        # gloo's and NCCL's errors are RuntimeErrors, those of the rendezvous ValueErrors
        if isinstance(error, (RuntimeError, ValueError)) and not isinstance(error, UsageError):
            ranks = self.ranks
            who = f"rank {ranks.members[ranks.rank]} waited for {self.what}{ranks.where()}"
            raise PeerLost(f"{who}, but {cause(error, ranks.timeout)}.") from error


class TorchTransport(Transport):
    """This process is one rank among several: gloo on CPU, NCCL where each rank has a GPU of its own.

    Where ranks share a GPU or NCCL is missing, tensors are staged through host memory and sent by gloo.
    """

    def __init__(
        self, rank: int, world: int, timeout: timedelta, last_words: Callable[[str], object] | None = None
    ):
        super().__init__()
        self.rank, self.world, self.timeout = rank, world, timeout
        self.last_words = last_words or self.last_words
        # the ranks of this rank's replica, and of all
        self.members, self.all_replicas = tuple(range(world)), [tuple(range(world))]
        self.places: list[Place] = []  # of the ranks of this rank's replica, see `locate`
        try:
            with self.waiting(f"all ranks to start, at {meeting_place()}", no_answer):
                self.counters = join(rank, world, timeout, restarts())
        except PeerLost as lost:
            if problem := no_meeting(lost.__cause__):
                raise UsageError(f"rank {rank} cannot meet the others: {problem}") from None
            raise
        self.watches: list[threading.Thread] = []  # see `watch_peers`
        # sends, with their step, keep their tensors alive until they are done
        self.in_flight: deque[tuple[int, dist.Work, Tensor]] = deque()

    def waiting(self, what: str, why: Callable[[], str | None] = lambda: None) -> "Wait":
        """PeerLost, in words, where torch.distributed gives up; where it does not, this process ends a little later. `why` it might."""
        return Wait(self, what, why)

    def at_most(self, what: str) -> AtMost:
        """The end of this process where what is within takes longer than the timeout and 3 seconds."""
        return AtMost(self.timeout.total_seconds() + 3, lambda: self.end(what))

    def end(self, what: str, why: str | None = None) -> None:
        """The last resort, in a thread of its own."""
        silent = f"{why or 'nothing came'} for {self.timeout.total_seconds():g} seconds (`timeout`)"
        self.last_words(f"rank {self.members[self.rank]} waited for {what}{self.where()}, but {silent}.")
        os._exit(1)

    def locate(self, device: torch.device | None) -> None:
        """Gather where each rank of the replica is, given this one's device; None where it has none, as its options are refused."""
        self.places = [Place(*place) for place in self.all_gather(this_place(device))]

    def neighbours(self) -> tuple[int, int]:
        """Ranks on this machine, and of these on this rank's GPU (all where it has none), itself among them; after `locate`."""
        own = self.places[self.rank]
        here = [place for place in self.places if place.machine == own.machine]
        return len(here), sum(place.gpu == own.gpu for place in here)

    def nccl_problem(self, size: int) -> str | None:
        """Why NCCL cannot carry the values of some replica where replicas have `size` ranks, None where it can; after `locate`."""
        each = [
            [self.places[rank] for rank in members]
            for members in replicas([place.node for place in self.places], size)
        ]
        return next(filter(None, map(no_nccl, each)), None)

    def divide(self, size: int) -> None:
        """Make replicas of `size` ranks, within a machine where possible; every rank must call it, before any channel is opened."""
        if size == self.world:
            return
        nodes = [place.node for place in self.places] or self.all_gather(os.environ.get("GROUP_RANK", "0"))
        self.all_replicas = replicas(nodes, size)
        with self.waiting("the other ranks to form replicas"):
            self.everybody = dist.new_group(timeout=timedelta(days=30), backend="gloo")
        self.replica = next(
            number for number, members in enumerate(self.all_replicas) if self.rank in members
        )
        self.replicas, self.members = len(self.all_replicas), self.all_replicas[self.replica]
        self.rank, self.world = self.members.index(self.rank), size
        self.places = [self.places[member] for member in self.members] if self.places else []

    def where(self) -> str:
        """The step or the phase, in words."""
        return f" in step {self.step}" if self.step >= 0 else f" ({self.doing})"

    def open_channels(self, device: torch.device, wish: str = "auto") -> None:
        """Make the channels for values that lie on `device`, by "nccl", "gloo" or as it fits; every rank of a replica must call it. UsageError where NCCL cannot be had."""
        if not self.places:
            self.locate(device)
        problem = no_nccl(self.places)
        if wish == "nccl" and problem:
            raise SharedError(f"`transport` nccl: {problem}; leave it out, or give `transport` gloo.")
        self.backend = "gloo" if problem or wish == "gloo" else "nccl"
        self.route = (
            ", "
            + self.backend
            + (" through host memory" if self.backend == "gloo" and device.type == "cuda" else "")
        )
        self.device = device
        # where values lie while they travel
        self.wire = device if self.backend == "nccl" else torch.device("cpu")
        with self.waiting("the other ranks to connect"):
            channels = {
                pair: dist.new_group(pair, timeout=self.timeout, backend=self.backend)
                for members in self.all_replicas  # a group's name is its number, which must be the same on all ranks
                for pair in itertools.permutations(members, 2)
            }
            farewells = [
                dist.new_group(members, timeout=timedelta(days=30), backend="gloo")
                for members in self.all_replicas
            ]
        self.channels = {
            (a, b): channels.get((self.members[a], self.members[b]))
            for a, b in itertools.permutations(range(self.world), 2)
        }
        self.farewells = farewells[self.replica]
        if self.backend == "nccl":
            self.watch_peers()
        self.warm_up()

    def warm_up(self) -> None:
        """One message over every channel, on all ranks in the same order.

        At a channel's first message NCCL waits until both ends have come there. Two ranks that send to each other first, each over its own channel, would wait for ever.
        """
        word = torch.zeros(1, device=self.wire)
        for sender, receiver in itertools.permutations(range(self.world), 2):
            with self.waiting("the other ranks to connect"):
                if self.rank == sender:
                    dist.send(word, self.members[receiver], group=self.channels[sender, receiver])
                elif self.rank == receiver:
                    dist.recv(word, self.members[sender], group=self.channels[sender, receiver])
        with self.waiting("the other ranks to connect"):
            if self.wire.type == "cuda":
                torch.cuda.synchronize(self.wire)  # NCCL's messages are only queued until now

    def watch_peers(self) -> None:
        """End this process when a rank of its replica ends early: NCCL would wait for it until the timeout.

        A thread for each of them waits, over gloo, for the word that `say_goodbye` sends.
        """

        def watch(rank: int) -> None:
            try:
                dist.recv(torch.zeros(1), rank, group=self.farewells)
            except RuntimeError as error:
                why = cause(error, self.timeout)
                self.last_words(f"rank {self.members[self.rank]} has lost rank {rank}{self.where()}: {why}.")
                os._exit(1)

        for rank in self.members:
            if rank != self.members[self.rank]:
                self.watches.append(threading.Thread(target=watch, args=(rank,), daemon=True))
                self.watches[-1].start()

    def shutdown_together(self) -> None:
        """What comes before the end of all ranks of a replica for a reason that all know, and that its first has said by now: none ends while that one speaks."""
        with suppress(PeerLost):
            self.all_gather("said")
            self.say_goodbye()

    def say_goodbye(self) -> None:
        """Send the word that the watches of the replica's other ranks wait for, and wait for theirs."""
        if self.watches:
            words = [
                dist.isend(torch.ones(1), self.members[rank], group=self.farewells)
                for rank in range(self.world)
                if rank != self.rank
            ]
            with self.waiting("the other ranks to leave"):
                for word in words:
                    word.wait()
                for watch in self.watches:  # they end with the others' words
                    watch.join(self.timeout.total_seconds())

    def shutdown(self) -> None:
        """The end of all work: nobody leaves before all ranks have come here, as one of them may hold the counters of all."""
        self.all_gather("done")
        if self.replicas > 1:
            with self.waiting("the other replicas to leave"):
                dist.barrier(group=self.everybody)
        self.say_goodbye()
        disconnect()

    def arrived(self, sender: int, to: int) -> bool:
        """Always: `receive` waits by itself."""
        return True

    def send(self, name: Name, tensors: Sequence[Tensor], sender: int, to: int) -> None:
        """Post the tensors to rank `to` and go on. Those of the step before the last were taken by now or soon will be: their tensors are let go."""
        self.count(name, tensors, sender, to)
        # gloo's sends do not tell by themselves that they are completed
        while self.in_flight and self.in_flight[0][0] < self.step - 1:
            with self.waiting("its messages to be taken"):
                self.in_flight.popleft()[1].wait()
        if TRACE:
            tensors = [
                label(self.step, name, [(tensor.shape, tensor.dtype) for tensor in tensors]),
                *tensors,
            ]
        for tensor in tensors:
            tensor = tensor.to(self.wire).contiguous()
            with self.waiting(f"rank {self.members[to]} to take {name}"):
                self.in_flight.append(
                    (self.step, dist.isend(tensor, self.members[to], group=self.channels[sender, to]), tensor)
                )

    def receive(self, name: Name, shapes: Shapes, sender: int, to: int) -> tuple[Tensor, ...]:
        """Wait for tensors of these (shape, dtype) from rank `sender`. PeerLost if it has ended or is silent for too long."""
        if TRACE:
            got, expected = (
                torch.empty(LABEL, dtype=torch.uint8, device=self.wire),
                label(self.step, name, shapes),
            )
            with self.waiting(f"{name} from rank {self.members[sender]}"):
                dist.recv(got, self.members[sender], group=self.channels[sender, to])
            if not torch.equal(got.cpu(), expected):
                sent, meant = (bytes(text.tolist()).decode().rstrip() for text in (got.cpu(), expected))
                raise PeerLost(
                    f"rank {self.members[to]} expected '{meant}' from rank {self.members[sender]}, which sent '{sent}'."
                )
        tensors = tuple(torch.empty(shape, dtype=dtype, device=self.wire) for shape, dtype in shapes)
        for tensor in tensors:
            with self.waiting(f"{name} from rank {self.members[sender]}"):
                dist.recv(tensor, self.members[sender], group=self.channels[sender, to])
        if TRACE:
            trace(f"step {self.step}: rank {to} <- rank {sender}: {name}")
        return tuple(tensor.to(self.device) for tensor in tensors)

    def synchronize(self) -> None:
        """NCCL's messages are only queued on the GPU until now. The end of this process if one does not come."""
        if self.backend == "nccl":
            with self.at_most("the messages of the other ranks"):
                torch.cuda.synchronize(self.wire)

    def flush(self) -> Counter[str]:
        """Wait for the sends of this rank; bytes by kind over all ranks of the replica since the last call."""
        while self.in_flight:
            with self.waiting("its messages to be taken"):
                self.in_flight.popleft()[1].wait()
        total: Counter[str] = Counter()
        for count in self.all_gather(dict(self.sent)):
            total.update(count)
        self.sent.clear()
        return total

    def all_gather(self, word: object) -> list:
        """Every rank's word (see `encode`) on every rank of the replica, as `decode` gives it, this rank's own too."""
        text = encode(word)
        words = self.swap([torch.tensor([len(text)]), text], self.receive_word)
        return [decode(text) if theirs is None else theirs[0] for theirs in words]

    def all_gather_tensor(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, on the CPU and of one shape and dtype, on every rank of the replica."""
        kinds = self.all_gather([list(tensor.shape), str(tensor.dtype)])
        if other := next((rank for rank, kind in enumerate(kinds) if kind != kinds[0]), None):
            raise PeerLost(
                f"rank {self.members[0]} has {kinds[0]} to share, and rank {self.members[other]} {kinds[other]}."
            )

        def receive(rank: int) -> Tensor:
            theirs = torch.empty_like(tensor)
            dist.recv(theirs, self.members[rank])
            return theirs

        tensor = tensor.contiguous()
        return [tensor if theirs is None else theirs for theirs in self.swap([tensor], receive)]

    def receive_word(self, rank: int) -> list:
        """The word that a rank sends, in a list. PeerLost where it is too long or none."""
        size = torch.zeros(1, dtype=torch.int64)
        dist.recv(size, self.members[rank])
        who = f"rank {self.members[self.rank]} got a word from rank {self.members[rank]}{self.where()} that"
        if not 0 < int(size) <= LONGEST:
            raise PeerLost(f"{who} is {int(size):,} bytes long, which no rank sends.")
        text = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(text, self.members[rank])
        try:
            return [decode(text)]
        except ValueError as error:
            raise PeerLost(f"{who} is no JSON ({error}).") from error

    def swap(self, tensors: Sequence[Tensor], receive: Callable[[int], object]) -> list:
        """Send tensors to all other ranks of the replica; what `receive` makes of each rank's, None for this rank."""
        sends, received = [], [None] * self.world
        # one by one, so that it is known whose word does not come
        others = [rank for rank in range(self.world) if rank != self.rank]
        for rank in others:
            with self.waiting(f"rank {self.members[rank]} to take a word"):
                sends.append([dist.isend(tensor, self.members[rank]) for tensor in tensors])
        for rank in others:
            with self.waiting(f"a word from rank {self.members[rank]}"):
                received[rank] = receive(rank)
        for rank, works in zip(others, sends):
            with self.waiting(f"rank {self.members[rank]} to take a word"):
                for work in works:
                    work.wait()
        return received

    def add(self, name: str, amount: int = 1) -> int:
        """Add to a counter that all replicas share, which begins at 0; its value afterwards."""
        with self.waiting("the counters of all ranks"):
            return self.counters.add(name, amount)

    def wait_for_all(self) -> None:
        """Wait until every rank of every replica is here, as long as somebody still adds to the counter "steps"; PeerLost if one has ended."""
        if self.replicas == 1:
            return
        with self.waiting("the other replicas"):
            here = dist.barrier(group=self.everybody, async_op=True)
        steps, changed = 0, time.monotonic()
        while not here.is_completed():
            time.sleep(0.1)
            now = self.add("steps", 0)
            steps, changed = now, changed if now == steps else time.monotonic()
            if time.monotonic() - changed > self.timeout.total_seconds():
                raise PeerLost(f"rank {self.members[self.rank]} waited for the other replicas, but they made no step for"
                               f" {self.timeout.total_seconds():g} seconds (`timeout`).")  # fmt: skip
        with self.waiting("the other replicas"):
            here.wait()


AnyTransport = LocalTransport | TorchTransport


def replicas(machines: Sequence[str], size: int) -> list[tuple[int, ...]]:
    """Ranks in replicas of `size`, given the machine of each rank: first those that fit into one machine, then what is left over. Rank 0 leads the first."""
    left, formed = list(range(len(machines))), []
    for machine in dict.fromkeys(machines):
        here = [rank for rank in left if machines[rank] == machine]
        for start in range(0, len(here) - size + 1, size):
            formed.append(tuple(here[start : start + size]))
            left = [rank for rank in left if rank not in formed[-1]]
    formed += [tuple(left[start : start + size]) for start in range(0, len(left), size)]
    return sorted(formed)


def place() -> tuple[int, int, int]:
    """(rank, ranks, local rank) from torchrun's environment; (0, 1, 0) without it."""
    values = [
        os.environ.get(name, default)
        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    ]
    if not all(number.isdecimal() for number in values) or int(values[0]) >= int(values[1]):
        raise UsageError(
            "RANK, WORLD_SIZE, LOCAL_RANK in the environment are {}, {}, {}: start the ranks by torchrun.".format(
                *map(ascii, values)
            )
        )
    return tuple(map(int, values))


def restarts() -> int:
    """The number of this attempt: how often torchrun (--max-restarts) has started the ranks anew; 0 at first, and without torchrun."""
    number = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(number) if number.isdecimal() else 0


def connect(
    timeout: timedelta = timedelta(minutes=10), last_words: Callable[[str], object] | None = None
) -> AnyTransport:
    """The transport of this process: `TorchTransport` under torchrun with two ranks or more, else `LocalTransport`.

    `last_words` is given the sentence where this process must end, by default stderr.
    """
    rank, world, _ = place()
    return TorchTransport(rank, world, timeout, last_words) if world > 1 else LocalTransport()


def disconnect() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
