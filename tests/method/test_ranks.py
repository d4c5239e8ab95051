"""Ranks that disagree, die or fall silent: the others end soon, with a sentence. `benchmarks/deaths.py` has the whole matrix."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch

from hybridiff.distributed.transport import label
from hybridiff.schedule import prediction
from tests.processes import start
from weights.load import open_checkpoint


def sentences(folder: Path, rank: int) -> list[str]:
    """What a rank said to the user in the end."""
    told = (folder / f"said-{rank}").read_text().replace("\r", "\n").splitlines()
    assert not any("Traceback" in line for line in told), told
    return [line for line in told if line.startswith("train_free_sample.py: ")]


DIFFERENT = {
    "prompt": (["--prompt", "a red star"], ["--prompt", "a blue star"], "--prompt"),
    "seed": (["--seed", "1"], ["--seed", "2"], "--seed"),
    "weights": ([], ["--weights", "demo-sd3", "--guidance", "5"], ""),
    "guidance": (["--guidance", "5"], ["--guidance", "5.5"], "--guidance"),
    "what to do": ([], ["--explain"], "what to do: rank 0 is asked for pictures, rank 1 for --explain"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_ranks_that_were_started_differently_refuse(what, tmp_path):
    *options, named = DIFFERENT[what]
    ranks = start([["--steps", "3", "--out", str(tmp_path / "p.png"), *given] for given in options], tmp_path)
    assert [rank.wait(60) for rank in ranks] == [2, 2]
    (said,) = sentences(tmp_path, 0)
    assert f"disagree about {named}" in said and sentences(tmp_path, 1) == []
    assert not (tmp_path / "p.png").exists()


@pytest.mark.parametrize(
    "victim, how, words",
    [(0, signal.SIGKILL, "has ended"), (1, signal.SIGSTOP, "nothing came for 2 seconds")],
)
def test_the_other_rank_ends_too(victim, how, words, tmp_path, monkeypatch):
    """In the middle of the loop, which the first rank's progress shows: a line at every tenth of the steps. For torchrun it is no root cause."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    options = ["--steps", "100", "--seed", "1", "--timeout", "2", "--out", str(tmp_path / "p.png")]
    ranks = start([options, options], tmp_path)
    try:
        while "step 10 of 100" not in (tmp_path / "said-0").read_text():
            assert ranks[0].poll() is None
            time.sleep(0.05)
        ranks[victim].send_signal(how)
        assert ranks[1 - victim].wait(20) == 1
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    (said,) = sentences(tmp_path, 1 - victim)
    assert f"rank {1 - victim} waited for" in said and " in step " in said and words in said
    assert f"from rank {victim} " in said or f"rank {victim} to take" in said
    written = json.loads((tmp_path / "error.json").read_text())["message"]
    assert said.endswith(written["message"])
    assert int(written["extraInfo"]["timestamp"]) > (tmp_path / "error.json").stat().st_mtime
    assert not list(tmp_path.glob("*.png*")) and not list(tmp_path.glob(".*"))


def test_interrupts_after_the_picture(tmp_path):
    """Where all is done Ctrl-C changes nothing, also while Python shuts down."""
    options = ["--steps", "2", "--seed", "1", "--out", str(tmp_path / "p.png")]
    ranks = start([options, options], tmp_path)
    try:
        while "picture: " not in (tmp_path / "said-0").read_text():
            assert ranks[0].poll() is None
            time.sleep(0.01)
        time.sleep(0.05)
        end = time.monotonic() + 60
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
            for rank in ranks:
                rank.send_signal(signal.SIGINT)
            time.sleep(0.03)
        assert [rank.poll() for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert sentences(tmp_path, 0) == sentences(tmp_path, 1) == [] and (tmp_path / "p.png").exists()


def test_a_label_tells_step_name_shape_and_dtype():
    same = label(3, prediction("cond"), [(torch.Size((1, 4)), torch.float16)])
    assert torch.equal(same, label(3, prediction("cond"), [(torch.Size((1, 4)), torch.float16)]))
    others = [
        (4, "cond", (1, 4), torch.float16),
        (3, "uncond", (1, 4), torch.float16),
        (3, "cond", (4, 1), torch.float16),
        (3, "cond", (1, 4), torch.float32),
    ]
    for step, text, shape, dtype in others:
        assert not torch.equal(same, label(step, prediction(text), [(torch.Size(shape), dtype)]))


def test_digest():
    """The same for the same file, another one for another."""
    first, again, other = (open_checkpoint(name).digest() for name in ("demo-sdxl", "demo-sdxl", "demo-sd3"))
    assert first == again != other
