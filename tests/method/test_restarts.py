"""Ranks that torchrun starts anew (--max-restarts) meet each other, not what the dead ones left in its store; ranks that cannot meet say why."""

import os
import subprocess
import sys
from pathlib import Path

from tests.tiny import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
RANK = """
import os, signal, sys
from datetime import timedelta
from hybridiff.distributed.transport import connect, restarts
import torch

transport = connect(timedelta(seconds=120))
rank, attempt = transport.rank, restarts()
words = transport.all_gather([rank, attempt])
assert words == [[0, attempt], [1, attempt]], words
if transport.add("pictures", 0) or transport.add("pictures of " + str(rank)) > 1:
    sys.exit("the counters of the dead attempt")
transport.all_gather(None)
transport.add("pictures")
transport.open_channels(torch.device("cpu"))
if attempt == 0:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    transport.all_gather("of the first attempt")
transport.divide(2)
transport.wait_for_all()
os.write(1, f"rank {rank} of attempt {attempt} is done\\n".encode())  # in one piece: two ranks write
transport.shutdown()
"""


def torchrun(folder: Path, *options: str, **env: str) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | env
    return subprocess.run(launch, capture_output=True, text=True, timeout=300, env=env, cwd=folder)


def test_a_restarted_attempt_does_not_meet_the_dead_one(tmp_path):
    """Gloo's addresses, barriers and counters: all ranks of the second attempt are new ones, and each works."""
    (tmp_path / "rank.py").write_text(RANK)
    ran = torchrun(tmp_path, "--max-restarts=1", str(tmp_path / "rank.py"))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert sorted(ran.stdout.splitlines()) == [f"rank {rank} of attempt 1 is done" for rank in range(2)]


SCRIPT = [sys.executable, str(ROOT / "train_free_sample.py"), "--steps", "2"]
REFUSED = {
    "an address that is none": (
        [1],
        {"MASTER_ADDR": "no.such.machine.invalid"},
        "there is no machine 'no.such.machine.invalid'",
    ),
    "a network interface that is none": (
        [0, 1],
        {"GLOO_SOCKET_IFNAME": "nosuchif0"},
        "there is no network interface 'nosuchif0'",
    ),
    "a restart on two machines": (
        [1],
        {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "1"},
        "torchrun has restarted the ranks, which works on one machine only, not on 2",
    ),
}


def test_why_ranks_cannot_meet(tmp_path):
    """Each says so in one sentence, long before the timeout of ten minutes; nothing is written."""
    running = []
    for what, (ranks, given, words) in REFUSED.items():
        port = str(free_port(1))
        for rank in ranks:
            env = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            env = os.environ | env | {"OMP_NUM_THREADS": "1"} | given
            ran = subprocess.Popen(SCRIPT, env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
            running.append((what, rank, words, ran))
    for what, rank, words, ran in running:
        told = ran.communicate(timeout=200)[1].splitlines()
        assert ran.returncode == 2 and len(told) == 1, (what, rank, told)
        assert told[0].startswith("train_free_sample.py: ") and words in told[0], (what, rank, told)
    assert not list(tmp_path.iterdir())


def test_nobody_at_the_address(tmp_path):
    """The sentence says where rank 0 was looked for."""
    port = str(free_port(1))
    env = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    ran = subprocess.run(
        [*SCRIPT, "--timeout", "2"], env=os.environ | env, cwd=tmp_path, capture_output=True, text=True
    )
    last = ran.stderr.splitlines()[-1]
    assert ran.returncode == 1 and not list(tmp_path.iterdir())
    assert last.startswith(f"train_free_sample.py: rank 1 waited for all ranks to start, at 127.0.0.1:{port}")
