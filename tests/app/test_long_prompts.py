"""Prompts that are longer than the text encoders read: the ids stay, and what is left out is said once."""

import json
import sys

import pytest

import train_free_sample
from tests.official import tensors, write_sparse
from tests.processes import SCRIPT, torchrun
from weights.load import open_checkpoint

HEAD = "a small green star above a large purple ring on a white background "  # 13 tokens in the demos
LONG = HEAD + HEAD + "and a blue cross"  # of 30 tokens, demo-sdxl reads 22
SMALL = ["--height=32", "--width=32"]
WORDS_LEFT = "on a white background and a blue cross"


@pytest.fixture
def run(monkeypatch, capsys):
    """The script in this process: (exit status, lines of stdout and stderr)."""

    def call(*options: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
        status = train_free_sample.main()
        told = capsys.readouterr()
        return status, (told.out + told.err).splitlines()

    return call


def cuts(lines: list[str]) -> list[str]:
    return [line for line in lines if " is cut: " in line]


@pytest.mark.parametrize("weights", ["demo-sdxl", "demo-sd3"])
def test_words_left_out_are_those_that_no_id_stands_for(weights):
    """Cut where the row ends: the text before has the same ids, and all of it fits."""
    checkpoint = open_checkpoint(weights)
    for part in ("clip_l", "clip_g", "t5"):
        if part not in checkpoint.parts:
            continue
        tokenizer = checkpoint.tokenizer(part)
        words = (HEAD * 40).split()
        for text in (" ".join(words), "  ".join(words) + " \n", " ".join(words).upper()):
            cut = tokenizer.cut(text)
            assert text.strip().endswith(cut.left_out)
            read = text.strip().removesuffix(cut.left_out)
            assert tokenizer.cut(read) is None
            assert (tokenizer(read) == tokenizer(text)).all() and cut.read < cut.tokens
            assert len(read.split()) + len(cut.left_out.split()) == len(words) == cut.tokens
        assert tokenizer.cut(HEAD) is None and tokenizer.cut("") is None


def test_official_clip_reads_75_tokens(tmp_path):
    tokenizer = open_checkpoint(
        str(write_sparse(tmp_path / "sdxl.safetensors", tensors("sdxl-base-1.0.single")))
    ).tokenizer("clip_g")
    assert tokenizer.cut("cat " * 75) is None
    cut = tokenizer.cut("cat " * 75 + "dog, bird")
    assert (cut.tokens, cut.read, cut.left_out) == (78, 75, "dog, bird")
    assert tokenizer.cut("cat " * 75 + "caf\u00e9\U0001f469\u200d\U0001f469 end").left_out.endswith("end")


def test_a_cut_is_said_for_a_picture_for_check_and_for_explain(tmp_path, run):
    options = ["--prompt", LONG, "--negative-prompt", f"red {LONG}"]
    sentences = [
        f'the prompt is cut: clip_l and clip_g read 22 of its 30 tokens; left out: "{WORDS_LEFT}"',
        f'the negative prompt is cut: clip_l and clip_g read 22 of its 31 tokens; left out: "ring {WORDS_LEFT}"',
    ]
    for more in (["--steps=1", *SMALL, f"--out={tmp_path / 'a.png'}"], ["--check"], ["--explain"]):
        status, lines = run(*options, *more)
        assert status == 0 and cuts(lines) == sentences, lines
    status, lines = run("--prompt", HEAD, "--check")
    assert status == 0 and cuts(lines) == []
    (tmp_path / "prompts.txt").write_text(f"{HEAD}\n{LONG}\n")
    status, lines = run("--check", "--prompts", str(tmp_path / "prompts.txt"))
    assert status == 0 and cuts(lines) == [f"prompt 2: {sentences[0]}"]


def test_t5_is_named_where_it_cuts_too(run):
    checkpoint = open_checkpoint("demo-sd3")
    clip, t5 = (checkpoint.tokenizer(part).length for part in ("clip_l", "t5"))
    prompt = " ".join((HEAD * 30).split() + ["blue"])
    said = {
        "clip_l and clip_g read": f" {clip - 2} of its 391 tokens",
        "t5 reads": f" {t5 - 1} of its 391 tokens",
    }
    for more, readers in (
        ([], ["clip_l and clip_g read", "t5 reads"]),
        (["--no-t5"], ["clip_l and clip_g read"]),
    ):
        status, lines = run("--weights", "demo-sd3", "--explain", "--prompt", prompt, *more)
        assert status == 0 and len(cuts(lines)) == len(readers)
        for line, reader in zip(cuts(lines), readers):
            assert f"the prompt is cut: {reader}{said[reader]}; left out: " in line and len(line) < 500
            assert line.count(' blue" (') == 1  # long: how it begins and ends


def test_two_ranks_say_every_cut_of_a_batch_once(tmp_path):
    """Pictures with the same cut share a line; what a prompts file says of its own counts."""
    lines = [HEAD, LONG, json.dumps({"prompt": HEAD, "negative_prompt": LONG}), f"\u2603\x07 {LONG}"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--images-per-prompt=4", "--steps=1", *SMALL]
    options += ["--out", str(tmp_path / "out")]
    ran = torchrun(*options)
    assert ran.returncode == 0, ran.stderr
    said = cuts((ran.stdout + ran.stderr).splitlines())
    assert len(said) == 3, said
    assert said[0].startswith("0005.png, 0006.png, 0007.png and 1 more: the prompt is cut: ")
    assert said[1].startswith("0009.png, 0010.png, 0011.png and 1 more: the negative prompt is cut: ")
    assert said[2].startswith("0013.png, 0014.png, 0015.png and 1 more: the prompt is cut: ")
    assert all(line.endswith(f'{WORDS_LEFT}"') for line in said)
