"""How values travel: every message pattern over gloo; NCCL is chosen where it can be had and refused in a sentence where not."""

import itertools
import os
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from tiny import free_port, make_task, run

import hybridiff.transport
from hybridiff.denoise import denoise
from hybridiff.errors import UsageError
from hybridiff.schedule import Name
from hybridiff.strategies import STRATEGIES, Settings
from hybridiff.switching import SwitchRule
from hybridiff.transport import Mailbox, Ranks, connect, disconnect, nccl_problem

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


def on_rank(rank: int, world: int, port: int, folder: str) -> None:
    """Body of a spawned rank: every pattern, each message compared as it comes."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    transport = connect(timedelta(seconds=60))
    transport.open_lanes(CPU)
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
    words = transport.gather("x" * 10 ** (rank + 1))  # words of unequal length
    assert [len(word) for word in words] == [10 ** (other + 1) for other in range(world)]
    (Path(folder) / str(rank)).write_text(f"{transport.backend} {sum(transport.finish().values())}")
    with pytest.raises(UsageError, match="carries those of CUDA devices only"):
        transport.open_lanes(CPU, "nccl")
    disconnect()


@pytest.mark.parametrize("world", [2, 3])
def test_every_pattern_over_gloo(world: int, tmp_path: Path):
    """`equal`, and in order; the ranks agree about the bytes; --transport nccl is refused on every rank alike."""
    mp.spawn(on_rank, (world, free_port(1), str(tmp_path)), nprocs=world)
    (told,) = {(tmp_path / str(rank)).read_text() for rank in range(world)}
    assert told.startswith("gloo ") and int(told.split()[1]) > 0


def test_one_process_sends_nothing():
    Mailbox().open_lanes(CPU, "gloo")
    Mailbox().leave()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_first_messages_never_wait_for_each_other(world: int, monkeypatch: pytest.MonkeyPatch):
    """Threads play the ranks; their sends and receives wait, as NCCL's first ones do, until the other end of the same lane is there."""
    lanes, late = {pair: threading.Barrier(2) for pair in itertools.permutations(range(world), 2)}, []

    def meets(word: torch.Tensor, other: int, group: tuple[int, int]) -> None:
        try:
            lanes[group].wait(5)
        except threading.BrokenBarrierError:
            late.append(group)

    def play(number: int) -> None:
        rank = object.__new__(Ranks)
        rank.rank, rank.world, rank.members, rank.timeout = (
            number,
            world,
            tuple(range(world)),
            timedelta(seconds=20),
        )
        rank.wire, rank.lanes = CPU, {pair: pair for pair in lanes}
        rank.meet()

    monkeypatch.setattr(hybridiff.transport.dist, "send", meets)
    monkeypatch.setattr(hybridiff.transport.dist, "recv", meets)
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
    transport.open_lanes(CPU)
    transport.watch_peers()
    transport.gather("ready")
    if dies and rank == 1:
        os._exit(9)
    if dies:
        time.sleep(120)  # as if it waited for NCCL
    transport.leave()


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
    "gpus, ranks, nccl, words",
    [(2, 2, True, None), (1, 2, True, "2 ranks share 1 GPU"), (2, 2, False, "no NCCL")],
)
def test_nccl_needs_a_gpu_a_rank(gpus, ranks, nccl, words, monkeypatch: pytest.MonkeyPatch):
    """What is chosen on machines with GPUs, as far as it can be told without one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(hybridiff.transport.dist, "is_nccl_available", lambda: nccl)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    problem = nccl_problem(torch.device("cuda", 0))
    assert problem is None if words is None else words in problem


@pytest.mark.parametrize("told, wish, backend, wire", [
    ([(None, "a cuda:0"), (None, "a cuda:1")], "auto", "nccl", "cuda"),
    ([(None, "a cuda:0"), (None, "a cuda:1")], "gloo", "gloo", "cpu"),
    ([(None, "a cuda:0"), (None, "a cuda:0")], "auto", "gloo", "cpu"),  # both were told --device cuda:0
    ([(None, "a cuda:0"), ("this build of torch has no NCCL", "b cuda:0")], "auto", "gloo", "cpu"),
])  # fmt: skip
def test_the_ranks_choose_alike(told, wish, backend, wire, monkeypatch: pytest.MonkeyPatch):
    """From what all ranks told; values for gloo are staged in host memory."""
    rank = object.__new__(Ranks)
    rank.rank, rank.world, rank.members, rank.all_teams, rank.team, rank.timeout = (
        0,
        2,
        (0, 1),
        [(0, 1)],
        0,
        timedelta(seconds=5),
    )
    rank.gather, rank.watch_peers, rank.meet = lambda word: told, lambda: None, lambda: None
    monkeypatch.setattr(hybridiff.transport.dist, "new_group", lambda *given, backend, **named: backend)
    rank.open_lanes(torch.device("cuda", 0), wish)
    assert rank.backend == backend and rank.wire.type == wire and set(rank.lanes.values()) == {backend}
    assert rank.route == {"nccl": ", nccl", "gloo": ", gloo through host memory"}[backend]


def on_gpu(rank: int, port: int, folder: str) -> None:
    """Body of a spawned rank with CUDA: the tiny picture of `tiny.run`, on the rank's GPU."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    transport = connect(timedelta(seconds=60))
    transport.open_lanes(device)
    task = make_task("sdxl", 8)
    told = {
        text: type(value)(*(tensor.to(device) for tensor in value))
        for text, value in task.conditioning.items()
    }
    task = replace(task, denoiser=task.denoiser.to(device), conditioning=told, noise=task.noise.to(device))
    records = list(denoise(task, STRATEGIES["paper"].on(task.denoiser), Settings(8, RULE), transport))
    torch.save([transport.backend, records[-1].latents.cpu()], Path(folder) / str(rank))
    transport.leave()


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
