"""Several pictures in one run: what is asked for, who makes it, that each equals the one made alone, and that a cut run goes on."""

import json
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

import hybridiff.app.several
from hybridiff.app.batch import make_jobs
from hybridiff.app.prompts import read_prompts
from hybridiff.distributed.transport import replicas
from hybridiff.errors import UsageError
from hybridiff.schedule import GUIDED
from tests.processes import SCRIPT, call, torchrun
from tests.small import random_states, write_single
from tests.tiny import free_port
from weights.load import open_checkpoint

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
        '{"prompt": "a", "height": 128.5}',
        '{"prompt": "a", "seed": 1e400}',
        "{oops",
        "",
        '{"prompt": "a", "guidance": 1' + "0" * 400 + "}",
    ],
)
def test_bad_lines_are_named(line, tmp_path):
    (tmp_path / "prompts").write_text(f"{'a star' if line else ''}\n{line}\n")
    with pytest.raises(UsageError, match="line 2 of" if line else "no prompt in it"):
        read_prompts(tmp_path / "prompts")


def test_whole_numbers_comments_and_arrays(tmp_path, monkeypatch, capsys):
    """128.0 is 128; lines that begin with "# " are comments, which is said; a file may be one JSON array."""
    lines = tmp_path / "lines"
    lines.write_text(
        '# mine\n{"prompt": "a", "height": 128.0, "seed": 3.0}\n #\n#3 on a shirt\n[red:0.5] star\n'
    )
    told = read_prompts(lines)
    assert told == [
        {"prompt": "a", "height": 128, "seed": 3},
        {"prompt": "#3 on a shirt"},
        {"prompt": "[red:0.5] star"},
    ]
    assert type(told[0]["height"]) is int and type(told[0]["seed"]) is int
    lines.write_text("[neon sign] at night\nb")
    assert read_prompts(lines) == [{"prompt": "[neon sign] at night"}, {"prompt": "b"}]
    (tmp_path / "array").write_text('\ufeff\n[\n  "a star",\n  {"prompt": "a\\nring", "width": 96.0}\n]\n')
    assert read_prompts(tmp_path / "array") == [{"prompt": "a star"}, {"prompt": "a\nring", "width": 96}]
    for text, words in (
        ('["a", 3]', "entry 2 of"),
        ('["a", {"prompt": 3}]', "entry 2 of .*prompt must be a text"),
        ('[{"prompt": "a"}', "begins like a JSON array"),
        ("[]", "no prompt in it"),
        ("# only\n#\n", "no prompt in it"),
    ):
        (tmp_path / "array").write_text(text)
        with pytest.raises(UsageError, match=words):
            read_prompts(tmp_path / "array")
    lines.write_text("# one\na star\n#\n")
    options = ("--prompts", str(lines), "--steps", "1", "--out", str(tmp_path / "all"))
    assert call(monkeypatch, *options) == 0
    assert "2 lines left out as comments" in capsys.readouterr().out
    assert [line["prompt"] for line in manifest(tmp_path / "all")] == ["a star"]


def test_prompts_from_a_pipe(tmp_path):
    """One process reads it; several ranks cannot, and say so."""
    command = "printf 'a star\\na ring\\n' | {} --prompts /dev/stdin --steps 1 --seed 1 --out all"
    alone = command.format(f"'{sys.executable}' '{SCRIPT}'")
    assert subprocess.run(["bash", "-c", alone], cwd=tmp_path, capture_output=True).returncode == 0
    assert [line["prompt"] for line in manifest(tmp_path / "all")] == ["a star", "a ring"]
    launch = f"'{sys.executable}' -m torch.distributed.run --standalone --nproc_per_node=2 '{SCRIPT}'"
    ran = subprocess.run(
        ["bash", "-c", command.format(launch).replace("all", "two")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    said = [line for line in ran.stderr.splitlines() if line.startswith("train_free_sample.py: ")]
    assert ran.returncode != 0 and len(said) == 1 and "is a pipe" in said[0] and "in a file" in said[0]
    assert not list(tmp_path.glob("two/*"))


def test_teams_stay_within_a_machine():
    """Whole teams within a machine first; what is left over crosses machines; rank 0 leads the first team."""
    assert replicas(["a"] * 4, 2) == [(0, 1), (2, 3)]
    assert replicas(["a", "a", "a", "b", "b", "b"], 2) == [(0, 1), (2, 5), (3, 4)]
    assert replicas(["a", "b", "b", "b"], 2) == [(0, 3), (1, 2)]
    assert replicas(["a", "a", "b", "b"], 4) == [(0, 1, 2, 3)]


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
        call(monkeypatch, *options, "--steps", "5", "--resume") == 2
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
    made, tried = hybridiff.app.several.generate, []

    def generate(checkpoint, plan, *args):
        tried.append(plan.request.prompt)
        if plan.request.prompt == "a large star":
            args[0].send(GUIDED, (), 0, 1)  # a message that nobody takes any more
            raise MemoryError("no more")
        return made(checkpoint, plan, *args)

    monkeypatch.setattr(hybridiff.app.several, "generate", generate)
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
    assert call(monkeypatch, "--prompt", "a", "--prompt", "b", "--resume", "--out", str(tmp_path)) == 2
    assert "another picture than this run would make" in capsys.readouterr().err and [
        path.name for path in tmp_path.iterdir()
    ] == ["0002.png"]


def test_odd_manifests_and_pictures(tmp_path, monkeypatch, capsys):
    """Lines that are no objects of ours are left out; a manifest that is none, and a picture beyond Pillow's limit, are refused before any work."""
    options = ("--prompt", "a", "--prompt", "b", "--steps", "1", "--seed", "1", "--out", str(tmp_path))
    assert call(monkeypatch, *options) == 0
    path = tmp_path / "manifest.jsonl"
    whole, picture = path.read_text(), (tmp_path / "0002.png").read_bytes()
    head, *lines = whole.splitlines()
    junk = ["123", "null", "[1]", '"x"', "[" * 99999, '{"number": [1]}', '{"number": null}', "{}", "9" * 9999]
    path.write_text("\n".join([head, *junk, *lines]) + "\n")
    (tmp_path / "0002.png").unlink()
    assert call(monkeypatch, *options, "--resume") == 0
    assert "1 pictures made, 0 failed, 1 found" in capsys.readouterr().out
    assert sorted(line["number"] for line in manifest(tmp_path)) == [0, 1]
    odd = json.loads(head)
    for first in (
        "123",
        "null",
        "[1]",
        "{}",
        json.dumps(odd | {"seed": "x"}),
        json.dumps(odd | {"batch": []}),
    ):
        path.write_text(first + "\n")
        assert call(monkeypatch, *options, "--resume") == 2
        assert "is no manifest" in (said := capsys.readouterr().err) and len(said.splitlines()) == 1
    path.write_text(whole)
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    first = picture[:12] + header + struct.pack(">I", zlib.crc32(header))
    bare, bomb = first + picture[-12:], first + picture[33:]
    for data in (bare, b"", picture[:-20], picture[:200]):  # without text, empty, torn
        (tmp_path / "0002.png").write_bytes(data)
        assert call(monkeypatch, *options, "--resume") == 2
        assert "0002.png is another picture" in (said := capsys.readouterr().err), said
        assert len(said.splitlines()) == 1 and (tmp_path / "0002.png").read_bytes() == data
    assert call(monkeypatch, *options, "--resume", "--overwrite") == 0
    assert (tmp_path / "0002.png").read_bytes() == picture
    (tmp_path / "0002.png").write_bytes(bomb)  # as large, but with this batch's text
    assert call(monkeypatch, *options, "--resume") == 0
    assert "0 pictures made, 0 failed, 2 found" in capsys.readouterr().out


def test_other_weights_of_the_same_name(tmp_path, monkeypatch, capsys):
    """--resume refuses them, also where only a text encoder is another; a manifest of before, without a digest, is taken with a remark."""
    states = random_states("sdxl", torch.float32)
    weights = tmp_path / "m.safetensors"
    write_single(weights, "sdxl", states)
    options = ("--weights", str(weights), "--steps", "1", "--seed", "1", "--height", "64", "--width", "64")
    options += ("--prompt", "a", "--prompt", "b", "--out", str(tmp_path / "all"))
    assert call(monkeypatch, *options) == 0
    (tmp_path / "all" / "0002.png").unlink()
    before = weights.read_bytes()
    for part in ("denoiser", "clip_g"):
        changed = states | {part: {name: tensor + 1 for name, tensor in states[part].items()}}
        write_single(weights, "sdxl", changed)
        assert call(monkeypatch, *options, "--resume") == 2
        assert "other weights" in (said := capsys.readouterr().err) and len(said.splitlines()) == 1
    assert not (tmp_path / "all" / "0002.png").exists()
    weights.write_bytes(before)
    path = tmp_path / "all" / "manifest.jsonl"
    head, *lines = path.read_text().splitlines()
    old = {name: value for name, value in json.loads(head).items() if name not in ("weights", "run")}
    path.write_text("\n".join([json.dumps(old), *lines]) + "\n")
    assert call(monkeypatch, *options, "--resume") == 0
    assert "taken to be of these" in capsys.readouterr().out
    assert json.loads(path.read_text().splitlines()[0])["weights"] == json.loads(head)["weights"]
    assert call(monkeypatch, *options, "--resume") == 0 and "taken to be" not in capsys.readouterr().out


def test_tokenizers_count_in_the_digest(tmp_path):
    """Files beside a checkpoint from which its tokenizers are read."""
    demo = SCRIPT.parent / "weights" / "demo"
    for name in ("demo-sd3.safetensors", "vocab.json", "merges.txt", "spiece.model"):
        (tmp_path / name).write_bytes((demo / name).read_bytes())
    weights = str(tmp_path / "demo-sd3.safetensors")
    digests = [open_checkpoint(weights).digest()]
    assert digests == [open_checkpoint("demo-sd3").digest()]
    for name in ("vocab.json", "merges.txt", "spiece.model"):
        with open(tmp_path / name, "ab") as file:
            file.write(b"\n")
        digests.append(open_checkpoint(weights).digest())
    assert len({*digests}) == 4


def test_a_folder_that_vanishes(tmp_path, monkeypatch, capsys):
    """In the middle of a batch: the run ends, what is lost is said, the latents are kept."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made, out = hybridiff.app.several.generate, tmp_path / "all"

    def generate(*args):
        shutil.rmtree(out)
        return made(*args)

    monkeypatch.setattr(hybridiff.app.several, "generate", generate)
    assert (
        call(monkeypatch, "--prompt", "a", "--prompt", "b", "--steps", "1", "--seed", "7", "--out", str(out))
        == 1
    )
    said = capsys.readouterr()
    (kept,) = tmp_path.glob("hybridiff-7-*.safetensors")
    assert str(kept) in said.out and "manifest.jsonl could not be written" in said.err and not out.exists()


def test_a_team_without_a_picture_waits_for_the_others(tmp_path):
    """One picture, two replicas: the idle one hears of every step, in the serial picture for comparison too, and does not give up after --timeout."""
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
    assert "0 pictures made, 2 failed" in ran.stdout and "decoder.conv_out.bias" in ran.stdout, ran.stdout
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
