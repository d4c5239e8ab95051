"""Several pictures in one run: what is asked for, who makes it, that each equals the one made alone, and that a cut run goes on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from small import random_states, write_single
from test_command_line import SCRIPT, call, torchrun
from tiny import free_port

import train_free_sample
from hybridiff.batch import make_jobs, read_prompts
from hybridiff.errors import UsageError
from hybridiff.schedule import GUIDED
from hybridiff.transport import teams

LINES = """a large red circle on a blue background
{"prompt": "a small green star on a white background", "seed": 5, "guidance": 3, "negative_prompt": "red"}

{"prompt": "a big violet ring on a yellow background", "height": 96, "width": 160}
"""


def pixels(path: Path) -> bytes:
    return Image.open(path).tobytes()


def manifest(folder: Path) -> list[dict]:
    """The lines of the pictures."""
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()][1:]


def test_jobs_from_lines(tmp_path):
    (tmp_path / "prompts").write_text(
        "\ufeff" + LINES.replace("violet ring", "violet\u2028ring").replace("\n", "\r\n"), encoding="utf-8"
    )
    told = read_prompts(
        tmp_path / "prompts"
    )  # as another system's editor saves it, with a line separator that JSON may hold
    assert [own["prompt"].split()[2] for own in told] == ["red", "green", "violet"]
    jobs = make_jobs(told, 2, 30, tmp_path)
    assert [job.own["seed"] for job in jobs] == [30, 31, 5, 6, 30, 31]
    assert [job.path.name for job in jobs] == [f"000{n}.png" for n in range(1, 7)]
    assert jobs[5].own["width"] == 160 and "width" not in jobs[0].own


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": 3}',
        '{"seed": 3}',
        '{"prompt": "a", "steps": 3}',
        '{"prompt": "a", "seed": true}',
        '{"prompt": "a", "height": "9"}',
        "{oops",
        "",
        '{"prompt": "a", "guidance": 1' + "0" * 400 + "}",
    ],
)
def test_bad_lines_are_named(line, tmp_path):
    (tmp_path / "prompts").write_text(f"{'a star' if line else ''}\n{line}\n")
    with pytest.raises(UsageError, match="line 2 of" if line else "no prompt in it"):
        read_prompts(tmp_path / "prompts")


def test_teams_stay_within_a_machine():
    """Whole teams within a machine first; what is left over crosses machines; rank 0 leads the first team."""
    assert teams(["a"] * 4, 2) == [(0, 1), (2, 3)]
    assert teams(["a", "a", "a", "b", "b", "b"], 2) == [(0, 1), (2, 5), (3, 4)]
    assert teams(["a", "b", "b", "b"], 2) == [(0, 3), (1, 2)]
    assert teams(["a", "a", "b", "b"], 4) == [(0, 1, 2, 3)]


@pytest.mark.parametrize("weights", ["demo-sdxl", "demo-sd3"])
def test_every_picture_equals_the_one_made_alone(weights, tmp_path, monkeypatch):
    """`equal` pixels: two pairs of ranks with a prompt that fails among them, against single runs in one process."""
    (tmp_path / "prompts").write_text(
        '{"prompt": "a blue star", "guidance": 1}\n' + LINES + '{"prompt": "a star", "height": 100}\n'
    )
    fixed = ["--weights", weights, "--steps", "8", "--seed", "3"]
    ran = torchrun(*fixed, "--prompts", str(tmp_path / "prompts"), "--out", str(tmp_path / "all"), ranks=4)
    assert ran.returncode != 0 and "4 pictures made, 1 failed" in ran.stdout, ran.stderr
    assert (
        len(ran.stdout.splitlines()) == 8 and "Traceback" not in ran.stderr.partition("torch/distributed")[0]
    )
    lines = {line["number"]: line for line in manifest(tmp_path / "all")}
    assert [lines[n]["status"] for n in range(5)] == ["made"] * 4 + ["failed"] and "--height 100" in lines[4][
        "why"
    ]
    alone = [
        ["--prompt", "a blue star", "--guidance", "1"],
        ["--prompt", "a large red circle on a blue background"],
        [
            "--prompt",
            "a small green star on a white background",
            "--seed",
            "5",
            "--guidance",
            "3",
            "--negative-prompt",
            "red",
        ],
        ["--prompt", "a big violet ring on a yellow background", "--height", "96", "--width", "160"],
    ]
    for number, options in enumerate(alone):
        assert call(monkeypatch, *fixed, *options, "--out", str(tmp_path / f"{number}.png")) == 0
        assert pixels(tmp_path / f"{number}.png") == pixels(tmp_path / "all" / lines[number]["file"])


def test_a_killed_batch_goes_on(tmp_path, monkeypatch, capsys):
    """Finished pictures stay as they are, the others are made, also where the kill came before a picture's line was written."""
    options = [
        "--prompt",
        "a red star",
        "--prompt",
        "a blue ring",
        "--images-per-prompt",
        "3",
        "--steps",
        "4",
        "--out",
        str(tmp_path / "all"),
    ]
    with open(tmp_path / "said", "w") as said:
        run = subprocess.Popen([sys.executable, str(SCRIPT), *options], stdout=said)
    while len(list((tmp_path / "all").glob("0*.png"))) < 2 and run.poll() is None:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "all").glob("0*.png")}
    assert 2 <= len(before) < 6
    path = tmp_path / "all" / "manifest.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]) + '{"number": 1, "fi')  # torn
    assert call(monkeypatch, *options) == 2 and "--resume" in capsys.readouterr().err
    assert (
        call(monkeypatch, *options, "--steps", "5", "--resume") == 1
        and "other prompts or options" in capsys.readouterr().err
    )
    assert call(monkeypatch, *options, "--resume") == 0
    assert f"{6 - len(before)} pictures made, 0 failed" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert sorted(line["number"] for line in manifest(tmp_path / "all")) == list(range(6))
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == [f"000{n}.png" for n in range(1, 7)] + [
        "manifest.jsonl"
    ]
    seed = manifest(tmp_path / "all")[0]["seed"]  # the drawn seed was kept
    assert call(monkeypatch, *options[:-1], str(tmp_path / "whole"), "--seed", str(seed)) == 0
    assert all(
        pixels(tmp_path / "all" / f"000{n}.png") == pixels(tmp_path / "whole" / f"000{n}.png")
        for n in range(1, 7)
    )
    assert call(monkeypatch, *options, "--resume") == 0 and "0 pictures made" in capsys.readouterr().out


def test_a_picture_that_breaks_is_reported_and_made_last(tmp_path, monkeypatch, capsys):
    """Too little memory for one picture: the others are made; the next run tries them before it."""
    made, tried = train_free_sample.generate, []

    def generate(checkpoint, request, *args):
        tried.append(request.prompt)
        if request.prompt == "a large star":
            args[0].send(GUIDED, (), 0, 1)  # a message that nobody takes any more
            raise MemoryError("no more")
        return made(checkpoint, request, *args)

    monkeypatch.setattr(train_free_sample, "generate", generate)
    options = [
        "--prompt",
        "a large star",
        "--prompt",
        "a ring",
        "--steps",
        "1",
        "--seed",
        "1",
        "--out",
        str(tmp_path),
    ]
    assert call(monkeypatch, *options) == 1
    assert [(line["number"], line["status"]) for line in manifest(tmp_path)] == [(0, "failed"), (1, "made")]
    assert (
        "ran out of memory" in manifest(tmp_path)[0]["why"]
        and "1 pictures made, 1 failed" in capsys.readouterr().out
    )
    for run in (1, 2):
        (tmp_path / "0002.png").unlink()
        assert (
            call(monkeypatch, *options, "--resume") == 1
            and tried[-2 * run :] == ["a ring", "a large star"] * run
        )


def test_a_lines_seed_is_its_own(tmp_path, monkeypatch):
    (tmp_path / "prompts").write_text('{"prompt": "a red star", "seed": 5}\na blue ring\n')
    assert (
        call(
            monkeypatch,
            "--prompts",
            str(tmp_path / "prompts"),
            "--steps",
            "1",
            "--seed",
            "3",
            "--out",
            str(tmp_path / "all"),
        )
        == 0
    )
    assert [line["seed"] for line in manifest(tmp_path / "all")] == [5, 3]


def test_pictures_of_no_batch_stay(tmp_path, monkeypatch, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "0002.png")
    assert call(monkeypatch, "--prompt", "a", "--prompt", "b", "--resume", "--out", str(tmp_path)) == 1
    assert "another picture than this run would make" in capsys.readouterr().err and [
        path.name for path in tmp_path.iterdir()
    ] == ["0002.png"]


def test_a_team_without_a_picture_waits_for_the_others(tmp_path):
    """One picture, two teams: the idle one hears of every step, in the serial picture for comparison too, and does not give up after --timeout."""
    options = (
        "--layout",
        "pairs",
        "--steps",
        "60",
        "--timeout",
        "6",
        "--report",
        str(tmp_path),
        "--compare-serial",
        "--out",
        str(tmp_path / "p.png"),
    )
    ran = torchrun(*options, ranks=4)
    assert ran.returncode == 0 and (tmp_path / "p.png").exists(), ran.stderr


def test_a_decoder_that_fails_on_one_rank(tmp_path):
    """Rank 0 decodes alone; the other hears of it, and the batch goes on."""
    states = random_states("sdxl", torch.float32)
    states["vae"]["decoder.conv_out.bias"][0] = torch.nan
    weights, prompts = (
        write_single(tmp_path / "m.safetensors", "sdxl", states),
        ("--prompt", "a", "--prompt", "b"),
    )
    options = (
        "--weights",
        str(weights),
        "--preset",
        "exact",
        "--steps",
        "2",
        "--height",
        "64",
        "--width",
        "64",
        *prompts,
    )
    ran = torchrun(*options, "--out", str(tmp_path / "all"))
    assert "0 pictures made, 2 failed" in ran.stdout and "another autoencoder" in ran.stdout, ran.stderr
    assert all(line["status"] == "failed" for line in manifest(tmp_path / "all"))


@pytest.mark.parametrize(
    "options",
    [
        ("--report", "r"),
        ("--images-per-prompt", "0"),
        ("--prompts", "none"),
        ("--out", "file"),
        ("--explain",),
        ("--decode", "file"),
        ("--transport", "nccl"),
    ],
    ids=" ".join,
)
def test_several_pictures_refused_in_one_sentence(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    assert call(monkeypatch, "--prompt", "a", "--prompt", "b", *options) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.rglob("*.png")] == []


def test_two_machines(tmp_path, monkeypatch):
    """Two agents of torchrun, two ranks each, as on two machines: pairs stay on theirs, pictures `equal` those of one process."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=2",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{free_port(1)}",
    ]
    options = ["--prompt", "a red star", "--images-per-prompt", "4", "--steps", "4", "--seed", "1"]
    agents = [
        subprocess.Popen(
            [*launch, str(SCRIPT), *options, "--out", str(tmp_path / "two")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0]
    assert sum("4 pictures made, 0 failed" in words for words in said) == 1
    assert {line["team"] for line in manifest(tmp_path / "two")} == {0, 1}
    assert call(monkeypatch, *options, "--out", str(tmp_path / "one")) == 0
    assert all(
        pixels(tmp_path / "two" / f"000{n}.png") == pixels(tmp_path / "one" / f"000{n}.png")
        for n in range(1, 5)
    )
