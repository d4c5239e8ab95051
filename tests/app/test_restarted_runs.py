"""Ranks that torchrun starts again after one was killed: what was made stays and is found, the rest is made, once."""

import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from tests.processes import SCRIPT, call

# The command line, but rank 1 kills itself once the picture of this attempt, the next of the first argument, is there.
KILLED = f"""
import os, signal, sys, time
from pathlib import Path
sys.path[:0] = [{str(SCRIPT.parent)!r}]
import train_free_sample
from hybridiff.distributed.transport import TorchTransport

pictures = sys.argv.pop(1).split(",")
attempt, start = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), time.time()
if os.environ["RANK"] == "1" and attempt < len(pictures):
    picture, gather, shutdown = Path(pictures[attempt]), TorchTransport.all_gather, TorchTransport.shutdown
    def die():
        if picture.exists() and picture.stat().st_mtime > start:
            os.kill(os.getpid(), signal.SIGKILL)
    TorchTransport.all_gather = lambda self, word: (die(), gather(self, word))[1]
    def wait(self):
        while True:
            die()
            time.sleep(0.02)
    TorchTransport.shutdown = wait
sys.exit(train_free_sample.main())
"""


def restarted(folder: Path, pictures: str, *options: str) -> subprocess.CompletedProcess:
    """Two ranks in `folder`, started again after each kill."""
    (folder / "killed.py").write_text(KILLED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2",
              "--monitor-interval=0.1", "killed.py", pictures]  # fmt: skip
    return subprocess.run(
        [*launch, *options],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_a_picture_that_was_finished_is_found(tmp_path):
    """Under a name of ours and with a seed that was drawn: exactly one picture, which is said, and status 0."""
    ran = restarted(tmp_path, "picture.png", "--steps", "2", "--timeout", "20")
    assert ran.returncode == 0, ran.stderr
    assert [path.name for path in tmp_path.glob("*.png")] == ["picture.png"]
    assert ran.stdout.splitlines()[-2:] == [
        "the picture was finished before this run was restarted",
        "picture: picture.png",
    ]
    assert ran.stdout.count("seconds of the slowest rank") <= 1


def test_a_batch_goes_on_and_keeps_what_this_run_made(tmp_path, monkeypatch):
    """Two kills, under --overwrite: pictures from before this run are replaced, those of its first attempts are not."""
    options = ("--prompt", "a star", "--prompt", "a ring", "--prompt", "a cross", "--steps", "1")
    before = ("--seed", "7", "--out", str(tmp_path / "pictures"))
    assert call(monkeypatch, *options, *before) == 0
    old = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "pictures").glob("*.png")}
    watched = "pictures/0001.png,pictures/0002.png"
    ran = restarted(tmp_path, watched, *options, "--seed", "7", "--overwrite", "--timeout", "20")
    assert ran.returncode == 0, ran.stderr
    told = [line for line in ran.stdout.splitlines() if "of them made before" in line]
    assert [line.split(",")[1].split()[0] for line in told] == ["0", "1", "2"], ran.stdout
    assert "1 pictures made, 0 failed, 2 found" in ran.stdout.splitlines()[-1]
    new = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "pictures").glob("*.png")}
    assert new.keys() == old.keys() and all(new[name] > old[name] for name in old)
    head, *lines = map(json.loads, (tmp_path / "pictures" / "manifest.jsonl").read_text().splitlines())
    assert sorted((line["number"], line["status"]) for line in lines) == [(n, "made") for n in range(3)]
    assert len({Image.open(path).text["run"] for path in (tmp_path / "pictures").glob("*.png")}) == 1
