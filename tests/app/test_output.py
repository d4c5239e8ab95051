"""What is written is whole or not there, whatever happens; what cannot be said does no harm."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import train_free_sample
from hybridiff.app.files import write_whole
from hybridiff.app.latents import save_both
from hybridiff.errors import UsageError

SCRIPT = train_free_sample.__file__
SMALL = ["--steps", "1", "--seed", "1", "--height", "128", "--width", "128", "--device", "cpu"]
TOLD = 7, {"prompt": "p"}


def test_a_full_disk_leaves_a_sentence_and_the_latents(tmp_path: Path):
    """The picture is larger than the file system takes, its latents are not."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))  # noqa: E731
    (tmp_path / "kept").mkdir()
    ran = subprocess.run([sys.executable, SCRIPT, *SMALL, "--out", str(tmp_path / "p.png")], preexec_fn=limit, capture_output=True, text=True,
                         env=os.environ | {"TMPDIR": str(tmp_path / "kept")})  # fmt: skip
    (said,) = [
        line for line in ran.stderr.replace("\r", "\n").splitlines() if "train_free_sample.py: " in line
    ]
    (kept,) = (tmp_path / "kept").iterdir()
    assert ran.returncode == 1 and "could not be written" in said and f"--decode {kept}" in said
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_kill_in_the_middle_leaves_nothing(tmp_path: Path):
    """Where the file system can hold a file without a name, as every usual one on Linux does."""
    try:
        os.close(os.open(tmp_path, os.O_TMPFILE | os.O_RDWR))
    except (OSError, AttributeError):
        pytest.skip("this file system has no nameless files (O_TMPFILE)")
    child = os.fork()
    if child == 0:
        write_whole(
            tmp_path / "p.png", lambda path: (path.write_bytes(b"half"), os.kill(os.getpid(), signal.SIGKILL))
        )
    assert os.waitpid(child, 0)[1] == signal.SIGKILL and list(tmp_path.iterdir()) == []


def test_what_can_be_written_is(tmp_path: Path):
    """The picture where the latents cannot be kept; the latents where they were wanted if the picture cannot be written."""
    image, latents = torch.zeros(8, 8, 3, dtype=torch.uint8), torch.zeros(1, 4, 1, 1)
    with pytest.raises(UsageError, match="The picture is in"):
        save_both(image, latents, tmp_path / "p.png", tmp_path / "none" / "l", *TOLD)
    assert Image.open(tmp_path / "p.png").size == (8, 8)
    with pytest.raises(UsageError, match="The latents are kept in") as caught:
        save_both(image, latents, tmp_path / "none" / "p.png", tmp_path / "l", *TOLD)
    assert "as PNG" not in str(caught.value)
    assert (tmp_path / "l").exists() and len(list(tmp_path.iterdir())) == 2


def test_the_picture_comes_after_its_latents(tmp_path: Path):
    """So a picture that a restarted run finds has its latents beside it."""
    image, latents = torch.zeros(8, 8, 3, dtype=torch.uint8), torch.zeros(1, 4, 1, 1)
    save_both(image, latents, tmp_path / "p.png", tmp_path / "l", *TOLD)
    assert (tmp_path / "l").stat().st_mtime_ns <= (tmp_path / "p.png").stat().st_mtime_ns


def test_the_latents_do_not_take_the_pictures_name(tmp_path: Path):
    ran = subprocess.run(
        [sys.executable, SCRIPT, *SMALL, "--out", "a.png", "--save-latents", "./a.png"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2 and "same file" in ran.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("streams", ["> /dev/full 2> /dev/full", ">&- 2>&-"])
def test_streams_that_fail_do_no_harm(streams: str, tmp_path: Path):
    """And neither do words that the terminal's encoding lacks, nor a name that is no UTF-8."""
    command = f"'{sys.executable}' '{SCRIPT}' {' '.join(SMALL)} --prompt 'ein grüner Stern ★' --out $'b\\xff.png' {streams}"
    ran = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env=os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    (made,) = tmp_path.iterdir()
    assert ran.returncode == 0 and Image.open(made).text["prompt"] == "ein grüner Stern ★"
