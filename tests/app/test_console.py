"""The command line's manners: what a picture's name means, what is printed where, what a mistake is answered, and torchrun's report."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, JpegImagePlugin, features

from tests.processes import SCRIPT, call, torchrun

FEW = ["--steps", "1", "--seed", "7"]
DESCRIPTION = 0x010E  # EXIF: ImageDescription


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference of two pictures, 0 to 255."""
    a, b = one.convert("RGB").tobytes(), other.convert("RGB").tobytes()
    assert len(a) == len(b)
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


def test_a_picture_is_what_its_name_says(tmp_path, monkeypatch):
    """Format, settings and seed by suffix, and nearly the PNG's pixels; no suffix is PNG; a decoded picture too."""
    monkeypatch.chdir(tmp_path)
    prompt = 'a large "red" circle, größer ★'
    names = {"p.png": "PNG", "p.JPG": "JPEG", "p.jpeg": "JPEG", "p.webp": "WEBP", "p": "PNG"}
    for name in names:
        assert call(monkeypatch, *FEW, "--prompt", prompt, "--out", name, "--save-latents", name + ".l") == 0
    assert call(monkeypatch, "--decode", "p.l", "--out", "d.webp") == 0
    exact = Image.open("p.png")
    for name, kind in (names | {"d.webp": "WEBP"}).items():
        picture = Image.open(name)
        assert picture.format == kind and picture.size == (128, 128)
        if kind == "PNG":
            told = {"prompt": picture.text["prompt"], "seed": int(picture.text["seed"])}
            settings = json.loads(picture.text["settings"])
            assert picture.tobytes() == exact.tobytes()
        else:
            told = json.loads(picture.getexif()[DESCRIPTION])
            settings = told.pop("settings")
            assert 0 < difference(picture, exact) < 12  # one step leaves noise
        assert told == {"prompt": prompt, "seed": 7} and settings == json.loads(exact.text["settings"])
        if kind == "JPEG":
            assert JpegImagePlugin.get_sampling(picture) == 0  # 4:4:4


REFUSED = {
    "--out p.gif": "ends in .gif",
    "--out p.tar.xz": "ends in .xz",
    "--decode l --out p.bmp": "ends in .bmp",
    "--out p.webp --width 16384": "16,383 pixels",
    "--prompts prompts --out p.png": "the name of a folder",
    "--prompt a --prompt b --out p.JPEG": "the name of a folder",
    "--images-per-prompt 2 --out p.webp": "the name of a folder",
    "--report r.html": "the name of a folder",
    "--promt x": "no option --promt: did you mean --prompt?",
    "--negative_prompt=x": "did you mean --negative-prompt?",
    "--Seed 3": "did you mean --seed?",
    "-steps 3": "did you mean --steps?",
    "--zzz": "no option --zzz. See --help",
    "--prompt a red fox": "red fox belongs to no option: put quotes",
    "--cap 4": "--cap has no effect with strategy step-extrapolation",
    "--preset paper --full-first 4": "--full-first has no effect with strategy paper",
    "--strategy papr --cap 4": "--strategy papr is unknown",
    "--decode l --seed 3": "--seed has no effect with --decode",
    "--negative-prompt red --guidance 1": "--negative-prompt has no effect with guidance 1",
    "--sampler HEUN": "choose one of ddim",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refused(line, tmp_path, monkeypatch, capsys):
    """Status 2, one sentence with what it must hold, and no new file or folder."""
    monkeypatch.chdir(tmp_path)
    Path("prompts").write_text("a star\n")
    assert call(monkeypatch, *line.split()) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and REFUSED[line] in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["prompts"]


def test_settings_too_long_for_a_jpeg(tmp_path, monkeypatch, capsys):
    """Its EXIF ends at 64 KB; WebP's and PNG's text do not."""
    monkeypatch.chdir(tmp_path)
    prompt = "red " * 20_000
    assert call(monkeypatch, *FEW, "--prompt", prompt, "--out", "p.jpg") == 2
    assert "64 KB" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    assert call(monkeypatch, *FEW, "--prompt", prompt, "--out", "p.webp") == 0
    assert json.loads(Image.open("p.webp").getexif()[DESCRIPTION])["prompt"] == prompt


def test_a_pillow_without_webp(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(features, "check", lambda name: name != "webp")
    assert call(monkeypatch, *FEW, "--out", "p.webp") == 2
    assert "cannot write WEBP" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    assert call(monkeypatch, *FEW, "--out", "p.jpg") == 0


@pytest.mark.parametrize("weights", ["demo-sdxl", "demo-sd3"])
def test_words_that_a_demo_does_not_know(weights, tmp_path, monkeypatch, capsys):
    """They and the known ones are named, and the picture is made; captions with synonyms go without a word."""
    monkeypatch.chdir(tmp_path)
    options = ["--weights", weights, *FEW]
    assert (
        call(monkeypatch, *options, "--prompt", "A photo of a red Cat, 猫🐱", "--negative-prompt", "dogs")
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert sum("does not know photo, Cat, 猫🐱, and" in line for line in lines) == 1
    assert sum("does not know dogs, and" in line for line in lines) == 1
    (known,) = (line for line in lines if line.startswith("the demo knows"))
    assert all(f" {word}" in known for word in ("red", "circle", "left of", "background", "big", "beneath"))
    assert Path("picture.png").exists()
    caption = "on a turquoise backdrop, a little violet hoop to the left of an orange DISK"
    assert call(monkeypatch, *options, "--prompt", caption) == 0
    assert "know" not in capsys.readouterr().out
    several = ["a cat", "a red star", "a cat", "a dog"]
    assert call(monkeypatch, *options, *(f"--prompt={prompt}" for prompt in several), "--out", "all") == 0
    said = capsys.readouterr().out
    assert [said.count(word) for word in ("not know cat", "not know dog", "does not know", "demo knows")] == [
        1,
        1,
        2,
        1,
    ]


def test_quiet(tmp_path, monkeypatch, capsys):
    """The path alone on stdout, of a picture, of one decoded and of a manifest; errors and failed pictures on stderr."""
    monkeypatch.chdir(tmp_path)
    given = [*FEW, "--quiet", "--prompt", "a cat"]
    assert (
        call(
            monkeypatch, *given, "--out", "a.png", "--save-latents", "l", "--report", "r", "--compare-serial"
        )
        == 0
    )
    assert capsys.readouterr() == ("a.png\n", "")
    assert call(monkeypatch, *given) == 0 and capsys.readouterr() == ("picture.png\n", "")
    assert call(monkeypatch, "--quiet", "--decode", "l", "--out", "b.png") == 0
    assert capsys.readouterr() == ("b.png\n", "")
    assert call(monkeypatch, *given, "--images-per-prompt", "2") == 0
    assert capsys.readouterr() == ("pictures/manifest.jsonl\n", "")
    Path("prompts").write_text('a star\n{"prompt": "a ring", "height": 100}\n')
    assert call(monkeypatch, *FEW, "--quiet", "--prompts", "prompts", "--out", "some") == 1
    said = capsys.readouterr()
    assert (
        said.out == "some/manifest.jsonl\n"
        and len(said.err.splitlines()) == 1
        and "0002.png failed: --height 100" in said.err
    )
    assert call(monkeypatch, *given, "--out", "a.png") == 2
    said = capsys.readouterr()
    assert said.out == "" and "a.png is there already" in said.err
    assert call(monkeypatch, "--quiet", "--check") == 0 and "denoiser" in capsys.readouterr().out
    assert call(monkeypatch, *FEW, "--out", "c.png") == 0  # quiet does not outlast its run
    assert "seed: 7\npicture: c.png" in capsys.readouterr().out


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress(tmp_path, monkeypatch, capsys):
    """A bar on a terminal; elsewhere a line at every tenth of the steps; neither with TQDM_DISABLE or --quiet."""
    monkeypatch.chdir(tmp_path)
    given = [
        "--steps",
        "12",
        "--guidance",
        "1",
        "--height",
        "16",
        "--width",
        "16",
        "--overwrite",
        "--out",
        "p.png",
    ]
    assert call(monkeypatch, *given) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"step {done} of 12" for done in (2, 3, 4, 5, 6, 8, 9, 10, 11, 12)
    ]
    written = {}
    for case in ("bar", "disabled", "quiet"):
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        if case == "disabled":
            monkeypatch.setenv("TQDM_DISABLE", "1")
        assert call(monkeypatch, *given, *(["--quiet"] if case == "quiet" else [])) == 0
        written[case] = terminal.getvalue()
        monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert "12/12" in written["bar"] and "step 2 of" not in written["bar"]
    assert written["disabled"] == written["quiet"] == ""


def test_no_bar_among_traced_messages(tmp_path):
    """On a real terminal: lines instead, and TQDM_DISABLE silences them."""
    given = [sys.executable, str(SCRIPT), "--steps", "3", "--height", "16", "--width", "16", "--out", "p.png"]
    ours, theirs = pty.openpty()
    ran = subprocess.run(
        given,
        cwd=tmp_path,
        stderr=theirs,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"HYBRIDIFF_TRACE": "1"},
    )
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 65536):
            written += part
    except OSError:  # how a terminal ends
        pass
    os.close(ours)
    assert ran.returncode == 0
    assert (
        b"rank 0 -> rank 1" in written
        and b"step 3 of 3" in written
        and b"it/s" not in written
        and b"3/3" not in written
    )


def test_report_and_serial_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = (
        "--steps 5 --reused 1 --full-first 2 --seed 1 --height 64 --width 64 --overwrite --out p.png".split()
    )
    given += ["--report", "deep/r", "--compare-serial"]
    assert call(monkeypatch, *given) == 0
    said = capsys.readouterr().out
    assert (
        "report: deep/r/report.html\n" in said
        and Path("deep/r/report.html").exists()
        and "bytes sent" not in said
    )
    report = json.loads(Path("deep/r/report.json").read_text())
    psnr, faster = re.search(r"against serial: PSNR ([\d.]+) dB, ([\d.]+) times as fast", said).groups()
    seconds = sum(step["seconds"] for step in report["steps"])
    assert float(psnr) == round(report["serial"]["psnr"], 1)
    assert float(faster) == pytest.approx(report["serial"]["seconds"] / seconds, abs=0.006)
    assert call(monkeypatch, *given[6:], "--steps", "1", "--strategy", "condition") == 0
    assert "against serial: the same pixels, " in capsys.readouterr().out


@pytest.mark.parametrize("names", [("--sampler", "Euler"), ("--sampler", "DPMPP_2M"), ("--preset", "Exact"), ("--strategy", "CONDITION"), ("--dtype", "Float32")])  # fmt: skip
def test_names_in_any_case(names, tmp_path, monkeypatch):
    """`equal` pixels and settings as with lower case."""
    monkeypatch.chdir(tmp_path)
    option, name = names
    assert call(monkeypatch, *FEW, option, name, "--out", "a.png") == 0
    assert call(monkeypatch, *FEW, option, name.lower(), "--out", "b.png") == 0
    a, b = Image.open("a.png"), Image.open("b.png")
    assert a.tobytes() == b.tobytes() and a.text == b.text


def test_a_failure_is_written_for_torchrun(tmp_path, monkeypatch, capsys):
    """As torch/distributed/elastic/multiprocessing/errors reads it; where it cannot be written nothing else changes; a good run writes none."""
    monkeypatch.chdir(tmp_path)
    for file, written in (("error.json", True), ("none/error.json", False), (".", False), ("", False)):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", file)
        assert call(monkeypatch, "--height", "100", "--prompt", "a \x1b[31m red") == 2
        said = capsys.readouterr().err
        if written:
            message = json.loads(Path(file).read_text())["message"]
            assert said == f"train_free_sample.py: {message['message']}\n"
            assert message["extraInfo"]["py_callstack"] == message["message"]
            assert int(message["extraInfo"]["timestamp"]) > 1.6e9
            Path(file).unlink()
        assert "--height 100" in said and list(tmp_path.iterdir()) == []
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "error.json")
    assert call(monkeypatch, *FEW, "--out", "a.png") == 0 and not Path("error.json").exists()


def test_torchruns_report_ends_with_our_sentence(tmp_path):
    """Of whichever rank torchrun notices first; `test_refused_on_every_rank` has refusals before any work."""
    (tmp_path / "prompts").write_text('a star\n{"prompt": "a ring", "height": 100}\n')
    ran = torchrun("--steps", "1", "--prompts", "prompts", cwd=tmp_path)
    root = ran.stderr.partition("Root Cause")[2]
    assert ran.returncode != 0 and "  traceback : 1 pictures failed; pictures/manifest.jsonl says why" in root
    assert "To enable traceback" not in ran.stderr
