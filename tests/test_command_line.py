"""The command line as a user meets it: pictures, reports and refusals, in one process and under torchrun."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from official import tensors, write_sparse
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

import hybridiff.app.options
import train_free_sample
from benchmarks.fuzz_commands import draw, try_line
from hybridiff.app.report.page import psnr
from hybridiff.request import usual_dtype
from weights.load import open_checkpoint

SCRIPT = Path(train_free_sample.__file__)
STAGES = ["warm-up", "parallelism", "fully-connecting"]


def call(monkeypatch, *options: str) -> int:
    """The script in this process."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    return train_free_sample.main()


def torchrun(*options: str, ranks: int = 2) -> subprocess.CompletedProcess:
    """The script on ranks of its own."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run([*launch, str(SCRIPT), *options], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("weights", ["demo-sdxl", "demo-sd3"])
def test_two_ranks_make_the_picture_of_one_process(weights, tmp_path, monkeypatch, capsys):
    """`equal` pixels for `paper`; the report and the PNG's metadata hold what they should."""
    options = [
        "--weights",
        weights,
        "--seed",
        "3",
        "--steps",
        "12",
        "--preset",
        "paper",
        "--cap",
        "4",
        "--interval",
        "3",
    ]
    ran = torchrun(
        *options, "--out", str(tmp_path / "two.png"), "--report", str(tmp_path / "two"), "--compare-serial"
    )
    assert ran.returncode == 0, ran.stderr
    assert (
        call(monkeypatch, *options, "--out", str(tmp_path / "one.png"), "--report", str(tmp_path / "one"))
        == 0
    )
    said = capsys.readouterr().out
    two, one = (Image.open(tmp_path / name) for name in ("two.png", "one.png"))
    assert two.size == (128, 128) and two.tobytes() == one.tobytes()
    assert two.text["seed"] == "3" and json.loads(two.text["settings"])["cap"] == 4 and two.text["prompt"]

    report, played = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("two", "one"))
    assert [step["stage"] for step in report["steps"]] == [STAGES[0]] * 4 + [STAGES[1]] * 4 + [STAGES[2]] * 4
    assert (report["tau1"], report["tau2"], report["seed"]) == (4, 7, 3)
    assert [step["discrepancy"] is None for step in report["steps"]] == [False] * 4 + [True] * 4 + [False] * 4
    assert report["bytes_sent"] == played["bytes_sent"]
    for told in (report, played):  # every rank's seconds in every step, gathered at rank 0
        assert len(told["ranks"]) == 2 and all(len(steps) == 12 for steps in told["ranks"])
    assert report["serial"]["equal"] is False and report["serial"]["psnr"] > 10 and "serial" not in played
    pages = [(tmp_path / name / "report.html").read_text() for name in ("two", "one")]
    assert ["times as fast as serial" in page for page in pages] == [
        True,
        False,
    ]  # one process plays the ranks in turn
    assert report["bytes_sent"]["total"] == sum(report["bytes_sent"]["by_operation"].values()) > 0
    assert {"load", "text", "waiting", "decode", *STAGES} <= report["seconds"].keys() and all(
        len(told) == 2 for told in report["seconds"].values()
    )
    for text, ranks in ((said, 1), (ran.stdout, 2)):
        assert "seed: 3" in text and ("bytes sent: " in text) == (ranks == 2) and "picture: " in text
    assert "warm-up -> parallelism" in ran.stdout and ran.stderr.count("fully-connecting") > 0


def test_serial_equals_condition_on_two_ranks(tmp_path, monkeypatch):
    """`equal` pixels, with a negative prompt, a non-square size and no report."""
    options = [
        "--seed",
        "5",
        "--steps",
        "6",
        "--prompt",
        "a green star on a white background",
        "--negative-prompt",
        "red",
    ]
    options += ["--height", "160", "--width", "96", "--sampler", "euler"]
    ran = torchrun(*options, "--strategy", "condition", "--out", str(tmp_path / "two.png"))
    assert ran.returncode == 0, ran.stderr
    assert call(monkeypatch, *options, "--strategy", "serial", "--out", str(tmp_path / "one.png")) == 0
    two, one = (Image.open(tmp_path / name) for name in ("two.png", "one.png"))
    assert two.size == (96, 160) and two.tobytes() == one.tobytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "one.png",
        "two.png",
    ]  # nothing half-written is left


def test_ranks_decode_a_large_picture_together(tmp_path, monkeypatch):
    """Nothing saved, so latents are `equal` to serial's; every rank decodes half of the rows, the pixels are `close`, above 50 dB."""
    options = ["--seed", "5", "--steps", "2", "--height", "512", "--width", "512"]
    ran = torchrun(
        *options,
        "--reused",
        "0",
        "--out",
        str(tmp_path / "two.png"),
        "--save-latents",
        str(tmp_path / "two.safetensors"),
        "--report",
        str(tmp_path),
    )
    assert ran.returncode == 0, ran.stderr
    assert (
        call(
            monkeypatch,
            *options,
            "--strategy",
            "serial",
            "--out",
            str(tmp_path / "one.png"),
            "--save-latents",
            str(tmp_path / "one.safetensors"),
        )
        == 0
    )
    two, one = (load_file(tmp_path / f"{name}.safetensors") for name in ("two", "one"))
    assert two.keys() == one.keys() and all(torch.equal(two[name], one[name]) for name in two)
    two, one = (torch.from_numpy(np.array(Image.open(tmp_path / f"{name}.png"))) for name in ("two", "one"))
    distance = psnr(two, one)
    assert distance is None or distance > 50
    report = json.loads((tmp_path / "report.json").read_text())
    assert (
        min(report["seconds"]["decode"]) > 0.2 * max(report["seconds"]["decode"])
        and "2 ranks together" in report["exact"]["words"]
    )


def test_examples_in_the_docs_are_what_is_printed(monkeypatch, capsys):
    """Every schedule in docs/method.md that stands below its command, line by line."""
    docs = (SCRIPT.parent / "docs" / "method.md").read_text()
    examples = re.findall(
        r"python train_free_sample.py ([^`\n]*--explain[^`\n]*)`?[^`]*\n```\n(.*?)```", docs, re.DOTALL
    )
    assert len(examples) == 2
    monkeypatch.setattr(
        torch.cuda, "device_count", lambda: 0
    )  # on a GPU fp16 is the default, and half the bytes are sent
    for options, printed in examples:
        assert call(monkeypatch, *options.split()) == 0
        assert printed in capsys.readouterr().out


def test_never_switched_is_null_and_said(tmp_path, monkeypatch, capsys):
    options = [
        "--preset",
        "paper",
        "--seed",
        "1",
        "--steps",
        "3",
        "--cap",
        "50",
        "--window",
        "40",
        "--out",
        str(tmp_path / "p.png"),
        "--report",
        str(tmp_path),
    ]
    assert call(monkeypatch, *options) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["tau1"] is None and report["tau2"] is None
    assert "never came" in capsys.readouterr().out


def test_a_seed_is_drawn_and_makes_the_picture_again(tmp_path, monkeypatch):
    """`equal` pixels from the seed stored in the PNG."""
    assert call(monkeypatch, "--steps", "2", "--out", str(tmp_path / "a.png")) == 0
    first = Image.open(tmp_path / "a.png")
    assert (
        call(monkeypatch, "--steps", "2", "--seed", first.text["seed"], "--out", str(tmp_path / "b.png")) == 0
    )
    assert first.tobytes() == Image.open(tmp_path / "b.png").tobytes()


REFUSED = [
    ("--strategy", "fast"), ("--strategy", "fast", "--guidance", "1"), ("--sampler", "heun"), ("--sampler", "flow"), ("--weights", "nothing-here"),
    ("--weights", "demo-sd3", "--sampler", "ddim"), ("--height", "100"), ("--width", "0"), ("--height", "-32"),
    ("--weights", "demo-sd3", "--height", "100000"), ("--steps", "0"), ("--steps", "-3"), ("--steps", "1000"),
    ("--steps", "many"), ("--guidance", "nan"), ("--preset", "paper", "--window", "1"),
    ("--preset", "paper", "--cap", "0"), ("--preset", "paper", "--interval", "-1"), ("--cap", "9"), ("--preset", "exact", "--reused", "3"),
    ("--preset", "quick"), ("--weights", "demo-sd3", "--t5", "fp8"), ("--t5", "fp8"), ("--reused", "-1"), ("--reused", "31"), ("--full-first", "1"), ("--full-first", "30", "--reused", "16"),
    ("--seed", "-1"), ("--dtype", "int8"), ("--device", "tpu0"), ("--threads", "0"), ("--unknown",),
    ("--resume",), ("--decode", "p", "--report", "r"), ("--decode", "p", "--seed", "3"), ("--preset", "paper", "--slope", "-1e-4"), ("--preset", "paper", "--slope", "nan"), ("--transport", "nccl"), ("--timeo", "5"),
    ("--prompt", "a red \udcff"), ("--negative-prompt", "\ud800"), ("--negative-prompt", "red", "--guidance", "1"), ("--t5", "cpu"),
]  # fmt: skip


@pytest.mark.parametrize("options", REFUSED, ids=" ".join)
def test_refused_in_one_sentence(options, tmp_path, monkeypatch, capsys):
    """Exit status 2, one line on stderr, nothing written."""
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *options) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.strip().splitlines()) == 1 and len(said.err) > 40
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["missing/p.png", ".", "file/p.png"])
def test_unwritable_output(out, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "--out", out) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "ranks, options",
    [
        (2, ("--strategy", "serial")),
        (2, ("--strategy", "batched")),
        (3, ()),
        (2, ("--out", "/dev/null/p.png")),
    ],
)
def test_refused_on_every_rank(ranks, options, tmp_path):
    """Rank 0 speaks once; no rank ends well (torchrun may end the last ones itself); no traceback but torchrun's own."""
    ran = torchrun(*options, ranks=ranks)
    lines = [line for line in ran.stderr.splitlines() if line.startswith("train_free_sample.py: ")]
    assert ran.returncode != 0 and len(lines) == 1
    codes = re.findall(r"exitcode  : (-?\d+)", ran.stderr)
    assert len(codes) == ranks and set(codes) <= {"2", "-15"}
    sentence = lines[0].removeprefix("train_free_sample.py: ")
    assert (
        f"  traceback : {sentence}" in ran.stderr.partition("Root Cause")[2]
    )  # torchrun's report ends with it
    assert str(SCRIPT) + '", line' not in ran.stderr


def test_check_says_what_is_there(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "--weights", "demo-sd3", "--check") == 0
    said = capsys.readouterr().out
    assert all(part in said for part in ("denoiser", "vae", "clip_l", "clip_g", "t5", "Nothing is missing"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "stored, usual",
    [("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float16), ("F8_E4M3", torch.float16)],
)
def test_the_usual_precision(stored, usual, tmp_path):
    """fp32 on the CPU; on CUDA bf16 if the denoiser is stored so, else fp16."""
    names = {key: (stored, shape) for key, (_, shape) in tensors("sd3.5-medium.single").items()}
    checkpoint = open_checkpoint(str(write_sparse(tmp_path / "m.safetensors", names)))
    assert usual_dtype(checkpoint, torch.device("cuda")) == usual
    assert usual_dtype(checkpoint, torch.device("cpu")) == torch.float32


def test_sd3_without_t5(monkeypatch, tmp_path):
    """Another picture than with T5, but a picture."""
    options = ["--weights", "demo-sd3", "--steps", "3", "--seed", "1", "--out"]
    assert call(monkeypatch, *options, str(tmp_path / "with.png")) == 0
    assert call(monkeypatch, *options, str(tmp_path / "without.png"), "--no-t5") == 0
    pictures = [Image.open(tmp_path / name).tobytes() for name in ("with.png", "without.png")]
    assert pictures[0] != pictures[1]


@settings(max_examples=20)
@given(rng=st.randoms(use_true_random=False))
def test_any_command_line_ends_well(rng: random.Random):
    """As in `benchmarks/fuzz_commands.py`: a whole picture or one sentence."""
    assert not (result := try_line(draw(rng, False), False))["wrong"], result


def test_torchrun_passes_every_option_on(monkeypatch):
    """torchrun looks at the script's options too, and gives up where one begins like two of its own, as --start does."""
    options = []
    monkeypatch.setattr(
        hybridiff.options.Parser, "parse_args", lambda parser: options.extend(parser._option_string_actions)
    )
    hybridiff.options.parse_arguments()
    for option in options:
        told = get_args_parser().parse_args(["--standalone", str(SCRIPT), option, "5"])
        assert told.training_script_args == [option, "5"]


def test_a_lone_surrogate_is_refused_in_a_prompt(tmp_path, monkeypatch, capsys):
    """Bytes that are no UTF-8; a prompt in UTF-8 is understood whatever the locale has made of it."""
    monkeypatch.chdir(tmp_path)
    assert (
        call(monkeypatch, "--prompt", "a \udcff", "--out", "p.png") == 2
        and "U+DCFF" in capsys.readouterr().err
    )
    assert call(monkeypatch, "--steps", "1", "--prompt", "gr\udcc3\udcbcn", "--out", "p.png") == 0
    assert Image.open("p.png").text["prompt"] == "grün"


@pytest.mark.parametrize("option", ["--prompt", "--negative-prompt", "--save-latents"])
def test_a_value_that_begins_with_a_minus(option, tmp_path, monkeypatch, capsys):
    """How to write it is said; so it is understood."""
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "--steps", "1", option, "-blurry") == 2
    assert f'{option}="-blurry"' in capsys.readouterr().err
    assert call(monkeypatch, option, "--steps", "1") == 2  # the value is lacking
    assert "expected one argument; see" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    if option != "--save-latents":
        assert call(monkeypatch, "--steps", "1", f"{option}=-blurry") == 0
        told = json.loads(Image.open("picture.png").text["settings"])
        assert told[option[2:].replace("-", "_")] == "-blurry"


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_tasks_of_another_launcher(name, tmp_path, monkeypatch, capsys):
    """Each would make the whole picture: refused with torchrun's line, which one task says; a single task is none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, "2")
    assert call(monkeypatch, "--steps", "1") == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and "torchrun --nproc_per_node=2" in said.err and said.out == ""
    rank = {"SLURM_STEP_NUM_TASKS": "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK"}
    monkeypatch.setenv(rank.get(name, "PMI_RANK"), "1")
    assert call(monkeypatch, "--steps", "1") == 2 and capsys.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(name, "1")
    assert call(monkeypatch, "--check") == 0
    monkeypatch.setenv(name, "2")
    monkeypatch.setenv("RANK", "0")  # torchrun in a task
    assert call(monkeypatch, "--check") == 0


def test_without_guidance_one_branch_is_run(tmp_path, monkeypatch, capsys):
    """`equal` pixels on one process and on two ranks, whatever the preset; the log says why."""
    options = ["--guidance", "0.5", "--steps", "3", "--seed", "1", "--out"]
    assert call(monkeypatch, *options, str(tmp_path / "one.png"), "--preset", "fast") == 0
    assert "nothing to split" in capsys.readouterr().out
    assert torchrun(*options, str(tmp_path / "two.png")).returncode == 0
    assert Image.open(tmp_path / "one.png").tobytes() == Image.open(tmp_path / "two.png").tobytes()


def test_nothing_is_overwritten_unasked(tmp_path, monkeypatch, capsys):
    """An existing file stays as it is; without --out the next free name is taken; --overwrite replaces."""
    monkeypatch.chdir(tmp_path)
    few = ["--steps", "1", "--seed", "1"]
    assert [call(monkeypatch, *few) for _ in range(2)] == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["picture-2.png", "picture.png"]
    (tmp_path / "picture.png").write_bytes(b"mine")
    assert (
        call(monkeypatch, *few, "--out", "picture.png") == 2
        and (tmp_path / "picture.png").read_bytes() == b"mine"
    )
    assert "--overwrite" in capsys.readouterr().err
    assert call(monkeypatch, *few, "--out", "picture.png", "--overwrite") == 0
    assert Image.open("picture.png").tobytes() == Image.open("picture-2.png").tobytes()


@pytest.mark.parametrize("family", ["demo-sdxl", "demo-sd3"])
def test_kept_latents_make_the_same_picture(family, tmp_path, monkeypatch, capsys):
    """`equal` pixels and metadata; other files and the other family's latents are refused."""
    options = [
        "--weights",
        family,
        "--out",
        str(tmp_path / "a.png"),
        "--save-latents",
        str(tmp_path / "l.safetensors"),
    ]
    assert call(monkeypatch, *options, "--steps", "2", "--seed", "5") == 0
    assert (
        call(
            monkeypatch,
            "--weights",
            family,
            "--decode",
            str(tmp_path / "l.safetensors"),
            "--out",
            str(tmp_path / "b.png"),
        )
        == 0
    )
    a, b = (Image.open(tmp_path / name) for name in ("a.png", "b.png"))
    assert a.tobytes() == b.tobytes() and a.text == b.text
    other = {"demo-sdxl": "demo-sd3", "demo-sd3": "demo-sdxl"}[family]
    capsys.readouterr()
    for weights, file in (
        (other, tmp_path / "l.safetensors"),
        (family, tmp_path / "a.png"),
        (family, tmp_path / "none"),
    ):
        assert (
            call(monkeypatch, "--weights", weights, "--decode", str(file), "--out", str(tmp_path / "c.png"))
            == 2
        )
        assert len(capsys.readouterr().err.strip().splitlines()) == 1 and not (tmp_path / "c.png").exists()


def test_the_picture_is_there_before_serials(tmp_path, monkeypatch, capsys):
    """--compare-serial that fails does not lose the picture."""

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(train_free_sample, "make_serial", fail)
    assert (
        call(
            monkeypatch,
            "--steps",
            "1",
            "--out",
            str(tmp_path / "a.png"),
            "--report",
            str(tmp_path),
            "--compare-serial",
        )
        == 1
    )
    assert "out of memory" in capsys.readouterr().err and Image.open(tmp_path / "a.png").size == (128, 128)


def test_a_picture_that_cannot_be_written_leaves_its_latents(tmp_path, monkeypatch, capsys):
    """The folder vanishes while the picture is made."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = train_free_sample.generate

    def generate(*args, **kwargs):
        gone.rmdir()
        return made(*args, **kwargs)

    monkeypatch.setattr(train_free_sample, "generate", generate)
    assert call(monkeypatch, "--steps", "1", "--seed", "7", "--out", str(gone / "a.png")) == 1
    (kept,) = tmp_path.glob("hybridiff-7-*.safetensors")
    assert str(kept) in capsys.readouterr().err
    monkeypatch.setattr(train_free_sample, "generate", made)
    assert call(monkeypatch, "--decode", str(kept), "--out", str(tmp_path / "a.png")) == 0
