"""Two runs at once: a name that was free at the start and is taken in the end is not replaced, and nothing is lost."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import hybridiff.app.several
import train_free_sample
from tests.processes import SCRIPT, call

FEW = ("--steps", "1", "--seed", "7")


def meanwhile(monkeypatch, *paths: Path) -> None:
    """Another run writes these files while the picture is made."""
    made = train_free_sample.generate

    def generate(*args, **named):
        for path in paths:
            path.write_text("theirs")
        return made(*args, **named)

    for module in (train_free_sample, hybridiff.app.several):
        monkeypatch.setattr(module, "generate", generate)


def test_two_runs_without_a_name(tmp_path):
    """Two processes: two pictures, both seeds. Two batches: one manifest, and the second ends with a sentence."""
    start = lambda *options: subprocess.Popen(  # noqa: E731
        [sys.executable, str(SCRIPT), "--steps", "1", *options], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    single = [start("--seed", seed) for seed in ("1", "2")]
    said = [run.communicate()[0] for run in single]
    assert [run.returncode for run in single] == [0, 0]
    pictures = [tmp_path / "picture.png", tmp_path / "picture-2.png"]
    assert {Image.open(path).text["seed"] for path in pictures} == {"1", "2"}
    assert sorted(text.splitlines()[-1] for text in said) == [
        "picture: picture-2.png",
        "picture: picture.png",
    ]
    batches = [start("--seed", seed, "--images-per-prompt", "2") for seed in ("1", "2")]
    said = [run.communicate()[1].splitlines() for run in batches]
    assert sorted(run.returncode for run in batches) == [0, 2]
    assert sum(len(lines) == 1 and "train_free_sample.py: " in lines[0] for lines in said) == 1, said
    head, *lines = map(json.loads, (tmp_path / "pictures" / "manifest.jsonl").read_text().splitlines())
    assert [line["seed"] for line in lines] == [head["seed"], head["seed"] + 1]


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_name_that_was_given(links, tmp_path, monkeypatch, capsys):
    """The other's file stays; the latents are kept, and make the picture. On a file system without links too."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if not links:

        def link(*_, **__):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    out = tmp_path / "p.png"
    with monkeypatch.context() as context:
        meanwhile(context, out)
        assert call(monkeypatch, *FEW, "--out", str(out)) == 1
    (kept,) = tmp_path.glob("hybridiff-7-*.safetensors")
    assert "made by another run meanwhile" in (said := capsys.readouterr().err) and str(kept) in said
    assert out.read_text() == "theirs"
    assert call(monkeypatch, "--decode", str(kept), "--out", str(tmp_path / "q.png")) == 0
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".png", ".png", ".safetensors"]
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as context:
        meanwhile(context, Path("picture.png"))
        assert call(monkeypatch, *FEW) == 0
    assert "picture: picture-2.png" in capsys.readouterr().out and Image.open("picture-2.png")
    with monkeypatch.context() as context:
        meanwhile(context, out)
        assert call(monkeypatch, *FEW, "--out", str(out), "--overwrite") == 0
    assert Image.open(out).text["seed"] == "7"


def test_latents_and_reports(tmp_path, monkeypatch, capsys):
    """They stay as the other run wrote them; the sentence says where the picture is."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for number, name in enumerate(("l.safetensors", "report.json", "report.html")):
        picture = tmp_path / f"{number}.png"
        options = ("--save-latents", str(tmp_path / name)) if number == 0 else ("--report", str(tmp_path))
        with monkeypatch.context() as context:
            meanwhile(context, tmp_path / name)
            assert call(monkeypatch, *FEW, "--out", str(picture), *options) == 1
        said = capsys.readouterr().err
        assert f"{name} was made by another run" in said and f"The picture is in {picture}." in said
        assert (tmp_path / name).read_text() == "theirs" and Image.open(picture)
        (tmp_path / name).unlink()
        (tmp_path / "report.json").unlink(missing_ok=True)
    assert len(list(tmp_path.glob("hybridiff-7-*.safetensors"))) == 1  # the latents that were asked for


def test_a_picture_of_a_batch(tmp_path, monkeypatch, capsys):
    """The one whose name is taken counts as failed, its latents are kept; counts add up."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    out = tmp_path / "all"
    options = (*FEW, "--prompt", "a star", "--prompt", "a ring", "--out", str(out))
    with monkeypatch.context() as context:
        meanwhile(context, out / "0002.png")
        assert call(monkeypatch, *options) == 1
    said = capsys.readouterr().out
    (kept,) = tmp_path.glob("hybridiff-7-*.safetensors")
    assert "1 pictures made, 1 failed, 0 found" in said and str(kept) in said
    assert (out / "0002.png").read_text() == "theirs"
    assert call(monkeypatch, *options, "--resume") == 2
    assert "0002.png is another picture" in capsys.readouterr().err
    assert call(monkeypatch, *options, "--resume", "--overwrite") == 0
    assert "1 pictures made, 0 failed, 1 found" in capsys.readouterr().out


def test_a_folder_in_which_another_batch_has_just_begun(tmp_path, monkeypatch, capsys):
    """Seen by nobody at the start: as if the folder had been empty when it was looked at."""
    (tmp_path / "manifest.jsonl").write_text("theirs")
    monkeypatch.setattr(Path, "glob", lambda *_, **__: iter(()))
    assert call(monkeypatch, *FEW, "--prompt", "a", "--prompt", "b", "--out", str(tmp_path)) == 2
    assert "Another run has just begun" in capsys.readouterr().err
    assert (tmp_path / "manifest.jsonl").read_text() == "theirs" and os.listdir(tmp_path) == [
        "manifest.jsonl"
    ]


def test_overwrite_replaces_the_usual_name(tmp_path, monkeypatch):
    """Without --out too: picture.png, not the next free number."""
    monkeypatch.chdir(tmp_path)
    Path("picture.png").write_text("old")
    assert call(monkeypatch, *FEW, "--overwrite") == 0
    assert os.listdir() == ["picture.png"] and Image.open("picture.png").text["seed"] == "7"
