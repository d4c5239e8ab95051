"""How values travel: every message pattern over gloo; NCCL is chosen where it can be had and refused in a sentence where not."""

import itertools
import math
import os
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

import hybridiff.distributed.transport
from hybridiff.denoise import denoise
from hybridiff.distributed.process_group import AtMost, Place, nccl_problem, this_place
from hybridiff.distributed.transport import LocalTransport, TorchTransport, connect, decode, disconnect
from hybridiff.errors import PeerLost, UsageError
from hybridiff.schedule import Name
from hybridiff.strategies import STRATEGIES, Settings
from hybridiff.switching import SwitchRule
from tests.tiny import free_port, make_task, run

CPU, RULE = torch.device("cpu"), SwitchRule(window=3, slope=0.0, cap=3, interval=2)
SHAPES = [
    ((), torch.float32),
    ((1, 4, 8, 8), torch.float16),
    ((1, 333, 64), torch.bfloat16),
    ((0,), torch.float32),
    ((1, 640, 64, 64), torch.float32),
]


def message(sender: int, number: int) -> tuple[torch.Tensor, ...]:
    """Two tensors that tell who sent them and when."""
    shape, dtype = SHAPES[number % len(SHAPES)]
    return torch.full(shape, sender + number, dtype=dtype), torch.full((2,), sender, dtype=torch.float32)


def bad_words(transport: TorchTransport) -> None:
    """What comes from rank 1 is bytes, not to be trusted: no JSON, a length that no word has."""
    for length, text, words in (
        (6, b"cos\nx.", "is no JSON"),  # the beginning of a pickle
        (2**26 + 1, b"", "is 67,108,865 bytes long, which no rank sends"),
        (-1, b"", "is -1 bytes long"),
    ):
        if transport.rank == 0:
            with pytest.raises(PeerLost, match=f"rank 0 got a word from rank 1 .*{words}"):
                transport.receive_word(1)
        else:
            torch.distributed.send(torch.tensor([length]), 0)
            if text:
                torch.distributed.send(torch.frombuffer(bytearray(text), dtype=torch.uint8), 0)


def on_rank(rank: int, world: int, port: int, folder: str) -> None:
    """Body of a spawned rank: every pattern, each message compared as it comes."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    transport = connect(timedelta(seconds=60))
    transport.open_channels(CPU)
    name = Name("prediction", "cond")

    def receive(sender: int, number: int) -> None:
        wanted = message(sender, number)
        got = transport.receive(name, [(tensor.shape, tensor.dtype) for tensor in wanted], sender, rank)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, wanted))

    others = [other for other in range(world) if other != rank]
    for number in range(
        len(SHAPES)
    ):  # an exchange of everybody with everybody: all sends are posted before anything is awaited
        for other in others:
            transport.send(name, message(rank, number), rank, other)
        for other in others:
            receive(other, number)
    for number in range(20):  # a stream in one direction, far ahead of its receiver
        if rank == 0:
            transport.send(name, message(0, number), 0, world - 1)
    if rank == world - 1:
        for number in range(20):
            receive(0, number)
    for number in range(5):  # a ring: what comes from the left goes on to the right
        transport.send(name, message(rank, number), rank, (rank + 1) % world)
        receive((rank - 1) % world, number)
    words = transport.all_gather("x" * 10 ** (rank + 1))  # words of unequal length
    assert [len(word) for word in words] == [10 ** (other + 1) for other in range(world)]
    for dtype in (torch.float64, torch.bfloat16):
        shared = transport.all_gather_tensor(torch.full((3, 2), rank, dtype=dtype).T)
        assert [tensor.dtype for tensor in shared] == [dtype] * world
        assert all(torch.equal(tensor, torch.full((2, 3), i, dtype=dtype)) for i, tensor in enumerate(shared))
    with pytest.raises(PeerLost, match=r"rank 0 has \[\[1\], 'torch.float32'\] to share"):
        transport.all_gather_tensor(torch.zeros(rank + 1))
    if world == 2:
        bad_words(transport)
    (Path(folder) / str(rank)).write_text(f"{transport.backend} {sum(transport.flush().values())}")
    with pytest.raises(UsageError, match="carries those of CUDA devices only"):
        transport.open_channels(CPU, "nccl")
    disconnect()


@pytest.mark.parametrize("world", [2, 3])
def test_every_pattern_over_gloo(world: int, tmp_path: Path):
    """`equal`, and in order; the ranks agree about the bytes; --transport nccl is refused on every rank alike."""
    mp.spawn(on_rank, (world, free_port(1), str(tmp_path)), nprocs=world)
    (told,) = {(tmp_path / str(rank)).read_text() for rank in range(world)}
    assert told.startswith("gloo ") and int(told.split()[1]) > 0


def test_one_process_sends_nothing():
    LocalTransport().open_channels(CPU, "gloo")
    LocalTransport().shutdown()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_first_messages_never_wait_for_each_other(world: int, monkeypatch: pytest.MonkeyPatch):
    """Threads play the ranks; their sends and receives wait, as NCCL's first ones do, until the other end of the same channel is there."""
    channels, late = {pair: threading.Barrier(2) for pair in itertools.permutations(range(world), 2)}, []

    def meets(word: torch.Tensor, other: int, group: tuple[int, int]) -> None:
        try:
            channels[group].wait(5)
        except threading.BrokenBarrierError:
            late.append(group)

    def play(number: int) -> None:
        rank = object.__new__(TorchTransport)
        rank.rank, rank.world, rank.members, rank.timeout = (
            number,
            world,
            tuple(range(world)),
            timedelta(seconds=20),
        )
        rank.wire, rank.channels = CPU, {pair: pair for pair in channels}
        rank.warm_up()

    monkeypatch.setattr(hybridiff.distributed.transport.dist, "send", meets)
    monkeypatch.setattr(hybridiff.distributed.transport.dist, "recv", meets)
    ranks = [threading.Thread(target=play, args=(number,)) for number in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert late == [] and not any(rank.is_alive() for rank in ranks)


def watching(rank: int, port: int, dies: bool) -> None:
    """Body of a spawned rank that watches its peer, as it does with NCCL."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    transport = connect(timedelta(seconds=60))
    transport.open_channels(CPU)
    transport.watch_peers()
    transport.all_gather("ready")
    if dies and rank == 1:
        os._exit(9)
    if dies:
        time.sleep(120)  # as if it waited for NCCL
    transport.shutdown()


@pytest.mark.parametrize("dies, codes", [(True, [1, 9]), (False, [0, 0])])
def test_a_watched_peer_that_ends_is_noticed_at_once(dies, codes):
    """Also by a rank that does not wait for a message; one that leaves as it should is not taken for lost."""
    port = free_port(1)
    ranks = [mp.get_context("spawn").Process(target=watching, args=(rank, port, dies)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(100)
    assert [rank.exitcode for rank in ranks] == codes


@pytest.mark.parametrize(
    "nccl, words",
    [(True, None), (False, "no NCCL")],
)
def test_nccl_needs_cuda(nccl, words, monkeypatch: pytest.MonkeyPatch):
    """What a rank can tell by itself, whatever the environment counts."""
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    problem = nccl_problem(torch.device("cuda", 0))
    assert problem is None if words is None else words in problem
    assert "the values lie on the cpu" in nccl_problem(CPU)


def at(machine: str, gpu: str | None, problem: str | None = None) -> Place:
    """A place of one node, as where ranks are started without torchrun."""
    return Place(machine, "0", gpu, problem)


@pytest.mark.parametrize("places, wish, backend, wire", [
    ([at("a", "gpu-0"), at("a", "gpu-1")], "auto", "nccl", "cuda"),  # each may see one GPU as cuda:0
    ([at("a", "gpu-0"), at("a", "gpu-1")], "gloo", "gloo", "cpu"),
    ([at("a", "gpu-0"), at("a", "gpu-0")], "auto", "gloo", "cpu"),  # both were told --device cuda:0
    ([at("a", "gpu-0"), at("b", "gpu-2", "this build of torch has no NCCL")], "auto", "gloo", "cpu"),
])  # fmt: skip
def test_the_ranks_choose_alike(places, wish, backend, wire, monkeypatch: pytest.MonkeyPatch):
    """From the places of all ranks; values for gloo are staged in host memory."""
    rank = object.__new__(TorchTransport)
    rank.rank, rank.world, rank.members, rank.all_replicas, rank.replica, rank.timeout = (
        0,
        2,
        (0, 1),
        [(0, 1)],
        0,
        timedelta(seconds=5),
    )
    rank.places, rank.watch_peers, rank.warm_up = places, lambda: None, lambda: None
    monkeypatch.setattr(
        hybridiff.distributed.transport.dist, "new_group", lambda *given, backend, **named: backend
    )
    rank.open_channels(torch.device("cuda", 0), wish)
    assert rank.backend == backend and rank.wire.type == wire and set(rank.channels.values()) == {backend}
    assert rank.route == {"nccl": ", nccl", "gloo": ", gloo through host memory"}[backend]


def test_who_shares_a_machine_and_a_gpu():
    """By what tells machines and GPUs apart: two machines may have one name, and a rank may see only its own GPU."""
    places = [at("box 1", "g0"), at("box 1", "g1"), at("box 2", "g2"), at("box 1", "g1"), at("box 2", None)]
    found = []
    for number in range(5):
        rank = object.__new__(TorchTransport)
        rank.rank, rank.places = number, places
        found.append(rank.neighbours())
    assert found == [(3, 1), (3, 2), (2, 1), (3, 2), (2, 1)] and LocalTransport().neighbours() == (1, 1)
    rank.places = [at("box", gpu) for gpu in ("g0", "g1", "g0", "g1")]
    assert rank.nccl_problem(2) is None  # replicas of ranks 0 and 1, 2 and 3
    assert rank.nccl_problem(4) == "2 ranks share one GPU (UUID g0), and NCCL needs one each"
    rank.places[3] = at("box", "g0")
    assert "2 ranks share one GPU" in rank.nccl_problem(2)
    assert this_place(CPU).machine == this_place(None).machine and this_place(CPU).gpu is None


ENDED, SILENT = "but the other side has ended.", "but nothing came for 600 seconds (`timeout`)."
FAILED = "but that failed: "
ERRORS = {
    "[pair.cc:553] Connection closed by peer [10.0.0.2]:24809. This is typically caused by ...": ENDED,
    "[pair.cc:301] Read error [10.0.0.2]:24809: Connection reset by peer": ENDED,
    "Broken pipe": ENDED,
    "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown?": ENDED,
    "[unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete": SILENT,
    "Application timeout caused pair closure": SILENT,
    "wait timeout after 4000ms, keys: /0//cpu//0/1": SILENT,
    "Timed out after 5 seconds waiting for clients. 1/2 clients joined.": SILENT,
    "The client socket has timed out after 4000ms while trying to connect to (10.0.0.1, 44861).":
        "but nothing came from (10.0.0.1, 44861) for 600 seconds (`timeout`).",
    "CUDA out of memory. Tried to allocate 544.00 MiB": FAILED + "CUDA out of memory. Tried to allocate 544.00 MiB.",
    "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be":
        FAILED + "CUDA error: an illegal memory access was encountered.",
    "NCCL error in: NCCLUtils.cpp:94, unhandled system error\nncclSystemError: call failed.\nLast error:\nshm /dev/shm/n: No space left on device":
        FAILED + "NCCL error in: NCCLUtils.cpp:94, unhandled system error ... Last error: shm /dev/shm/n: No space left on device.",
    "NCCL error, invalid usage. Last error: Duplicate GPU detected : rank 0 and rank 1":
        FAILED + "NCCL error, invalid usage. Last error: Duplicate GPU detected : rank 0 and rank 1.",
    "Gloo connectFullMesh failed with timed out connecting: SO_ERROR: Connection refused, remote=[127.0.1.1]:19845":
        "Connection refused, remote=[127.0.1.1]:19845; GLOO_SOCKET_IFNAME names the network interface to use.",
}  # fmt: skip


@pytest.mark.parametrize("told", ERRORS)
def test_only_what_is_known_is_called_a_lost_peer(told: str):
    """Messages of torch 2.13, as killed and stopped ranks brought them, and others that have nothing to do with a peer."""
    rank = object.__new__(TorchTransport)
    rank.rank, rank.members, rank.timeout = 0, (0, 1), timedelta(seconds=600)
    with pytest.raises(PeerLost) as caught, rank.waiting("a word"):
        raise RuntimeError(told)
    assert str(caught.value).startswith("rank 0 waited for a word") and str(caught.value).endswith(
        ERRORS[told]
    )


def test_waits_may_nest_and_overlap():
    """Each has a deadline of its own; one that is over is forgotten, and one thread watches all."""
    late: list[str] = []

    def wait(name: str, limit: float, seconds: float) -> None:
        with AtMost(limit, lambda: late.append(name)), AtMost(60, lambda: late.append("never")):
            time.sleep(seconds)

    before = threading.active_count()
    threads = [
        threading.Thread(target=wait, args=given)
        for given in (("late", 0.1, 1.5), ("in time", 1.0, 0.1), ("later", 0.4, 1.5))
    ]
    for thread in threads:
        thread.start()
    assert threading.active_count() <= before + len(threads) + 1
    for thread in threads:
        thread.join()
    time.sleep(0.6)
    assert sorted(late) == ["late", "later"] and not AtMost.waits


def test_words_are_data():
    """They come back as JSON has them, also within one process; what is none is refused, as is what is too long."""
    words = [None, True, 2**70, 0.1, float("inf"), '\ud800 \u2028 "', [1, (2, 3)], {"a": {"b": []}}]
    expected = [*words[:6], [1, [2, 3]], words[7]]
    assert LocalTransport().all_gather(words) == [expected]
    assert math.isnan(LocalTransport().all_gather(math.nan)[0])
    for word in ({1, 2}, Path("x"), b"x", torch.zeros(1)):
        with pytest.raises(TypeError):
            LocalTransport().all_gather(word)
    with pytest.raises(UsageError, match="too much for one word between ranks"):
        LocalTransport().all_gather("x" * 2**26)
    with pytest.raises(ValueError):
        decode(torch.frombuffer(bytearray(b"[" * 10**6), dtype=torch.uint8))


def on_gpu(rank: int, port: int, folder: str) -> None:
    """Body of a spawned rank with CUDA: the tiny picture of `tiny.run`, on the rank's GPU."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    transport = connect(timedelta(seconds=60))
    transport.open_channels(device)
    task = make_task("sdxl", 8)
    told = {
        text: type(value)(*(tensor.to(device) for tensor in value))
        for text, value in task.conditioning.items()
    }
    task = replace(task, denoiser=task.denoiser.to(device), conditioning=told, noise=task.noise.to(device))
    records = list(denoise(task, STRATEGIES["paper"].on(task.denoiser), Settings(8, RULE), transport))
    torch.save([transport.backend, records[-1].latents.cpu()], Path(folder) / str(rank))
    transport.shutdown()


def test_two_ranks_on_gpus(tmp_path: Path):
    """`close` to the CPU: by NCCL with two GPUs, through host memory with one."""
    if not torch.cuda.is_available():
        pytest.skip(
            "there is no CUDA device here: NCCL, and messages that are staged from a GPU, are not run"
        )
    mp.spawn(on_gpu, (free_port(1), str(tmp_path)), nprocs=2)
    for rank in range(2):
        backend, latents = torch.load(tmp_path / str(rank))
        assert backend == ("nccl" if torch.cuda.device_count() > 1 else "gloo")
        assert torch.allclose(latents, run("sdxl", "paper", 8, RULE)["latents"][-1], atol=1e-3)
