"""Seeded random command lines: `python benchmarks/hardship/fuzz_commands.py --count 500`, or `--torchrun --count 50` on two ranks.

Each must end with a whole picture that tells its prompt, or with one sentence of ours, an exit status other than 0 and nothing left behind; never
with an exception. The first kind runs the command line in this one process, on the demo checkpoints.
"""

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

import train_free_sample  # noqa: E402
from benchmarks.common import in_words, machine, table  # noqa: E402

SCRIPT = ROOT / "train_free_sample.py"
NUMBERS = [
    "nan",
    "inf",
    "-inf",
    "1e9",
    "-1e9",
    "1e-300",
    "1e400",
    "0",
    "-0.0",
    "1",
    "0.999",
    "٣",
    "1_0",
    "five",
    "",
    "0x10",
    "9" * 400,
    "9" * 6000,
]
SIZES = ["8", "16", "24", "64", "0", "-8", "1", "7", "9", "65536", "65544", "1000000000000", "9" * 30]
TEXTS = [
    "a red circle", "", " ", "\x1b[31mred\x07\x08", "line\nline\r\ttab", "a" * 100_000, "🟥 ◯ 円 " * 300, "e\u0301\u202e\ufeff", "<script>\"'&amp;",
    "half \ud800 a pair", "byte \udcff", "\x7f\x01\x02", "--steps", "%s {0} $HOME `id`", "\u2028 \u0085",
]  # fmt: skip
PATHS = [
    "a.png",
    "ü 円.png",
    "byte \udcff.png",
    "new\nline.png",
    "\x1b[31m.png",
    "none/a.png",
    ".",
    "",
    "/dev/null/a.png",
    "n" * 300,
    "p" * 5000 + ".png",
]
SETTINGS = {
    "--weights": ["demo-sdxl", "demo-sd3", "demo-sd3", "none", "", ".", "/dev/null", "\udcff", "w" * 5000],
    "--prompt": TEXTS, "--negative-prompt": TEXTS,
    "--steps": ["1", "2", "3", "5", "1000", "1001", "0", "-1", *NUMBERS],
    "--guidance": ["5", "1.5", *NUMBERS], "--height": SIZES, "--width": SIZES,
    "--seed": ["0", "7", str(2**63 - 1), str(2**63), "-1", *NUMBERS],
    "--sampler": ["ddim", "euler", "dpmpp_2m", "flow", "heun", ""],
    "--preset": ["exact", "balanced", "fast", "paper", "quick"],
    "--strategy": ["serial", "batched", "condition", "paper", "inner-reuse", "guided-pipeline", "step-extrapolation", "one-branch", "\udcff"],
    "--reused": ["0", "1", "900", "-1", *NUMBERS], "--full-first": ["2", "900", "1", *NUMBERS],
    "--window": ["1", "5000", "0", *NUMBERS], "--slope": NUMBERS, "--cap": ["1", "5000", "0", *NUMBERS], "--interval": ["0", "3", "5000", "-1", *NUMBERS],
    "--dtype": ["float32", "int8"], "--device": ["cpu", "cpu:7", "meta", "tpu", "\udcff", ""], "--t5": ["device", "cpu", "fp8", "gpu"],
    "--threads": ["1", "0", *NUMBERS], "--timeout": ["60", "0", *NUMBERS], "--transport": ["auto", "gloo", "nccl", "smoke"], "--out": PATHS,
    "--save-latents": PATHS, "--report": ["r", "\udcff", "none/r", "/dev/null/r", "r" * 300, ""], "--decode": PATHS,
}  # fmt: skip
FLAGS = [
    "--tiles",
    "--overwrite",
    "--compare-serial",
    "--no-t5",
    "--explain",
    "--check",
    "--unknown",
    "extra",
]


def draw(rng: random.Random, torchrun: bool) -> list[str]:
    """One command line: small and right at its base, with up to four settings drawn from above."""
    given = {"--steps": "2", "--height": "16", "--width": "16"}
    for name in rng.sample(sorted(SETTINGS), rng.randrange(1, 5)):  # the first ones of a list are mostly good
        given[name] = rng.choice(SETTINGS[name] if rng.random() < 0.4 else SETTINGS[name][:3])
    if given["--steps"] == "1000":
        given |= {"--height": "16", "--width": "16", "--sampler": rng.choice(["euler", "dpmpp_2m"])}
    if "--window" in given and rng.random() < 0.5:
        given["--preset"] = "paper"
    if rng.random() < 0.15:  # a name that decoding may find
        given["--decode"] = "a.png"
    if "--decode" in given and rng.random() < 0.5:  # the base has no part in it
        for name in ("--steps", "--height", "--width"):
            given.pop(name)
    line = [
        part
        for name, value in given.items()
        for part in ([f"{name}={value}"] if rng.random() < 0.5 or value.startswith("-") else [name, value])
    ]
    line += rng.sample(FLAGS, 1) if rng.random() < 0.3 else []
    if torchrun:  # what a command line can carry
        line = [part.replace("\ud800", "\udc80") for part in line]
    return line


def in_process(line: list[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command line in this process; a stream takes what UTF-8 takes."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace") for _ in range(2)]
    kept, sys.argv = (sys.argv, sys.stdout, sys.stderr), [str(SCRIPT), *line]
    sys.stdout, sys.stderr = streams
    try:
        status = train_free_sample.main()
    except BaseException as error:
        status, _ = -1, print(f"{type(error).__name__}: {error!s:.200}", file=streams[1])
    finally:
        sys.argv, sys.stdout, sys.stderr = kept
    for stream in streams:
        stream.flush()
    return status, *(stream.buffer.getvalue().decode() for stream in streams)


def by_torchrun(line: list[str]) -> tuple[int, str, str]:
    """The same on two ranks."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(SCRIPT),
    ]
    ran = subprocess.run(
        [*launch, *line], capture_output=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return ran.returncode, ran.stdout.decode(errors="replace"), ran.stderr.decode(errors="replace")


def try_line(line: list[str], torchrun: bool) -> dict:
    """What came of one command line, in an empty folder."""
    start, home = time.monotonic(), Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        try:
            status, out, err = (by_torchrun if torchrun else in_process)(line)
            wrong = judge(line, status, out, err, Path(name))
        finally:
            os.chdir(home)
    said = [told for told in err.replace("\r", "\n").splitlines() if "train_free_sample.py: " in told]
    return {"line": " ".join(map(ascii, line))[:300], "status": status, "picture": "picture: " in out, "seconds": time.monotonic() - start, "wrong": wrong,
            "said": said[0].partition("train_free_sample.py: ")[2] if said else ""}  # fmt: skip


def judge(line: list[str], status: int, out: str, err: str, folder: Path) -> str:
    """What is wrong with an end; "" where nothing is."""
    said = [line for line in err.replace("\r", "\n").splitlines() if "train_free_sample.py: " in line]
    wrong = (
        ["an error of ours"] if f'File "{ROOT}' in err or any(" failed: " in line for line in said) else []
    )  # torchrun has a traceback of its own
    made = [line.removeprefix("picture: ") for line in out.splitlines() if line.startswith("picture: ")]
    pictures = [
        path for path in folder.rglob("*") if path.is_file() and path.read_bytes().startswith(b"\x89PNG")
    ]
    if status == 0 and said:
        wrong.append("a sentence, but status 0")
    if status == 0 and not made and not {"--check", "--explain"} & {*line}:
        wrong.append("no picture, but status 0")
    if status == 0 and made:
        picture = Image.open(*pictures) if len(pictures) == 1 else None
        if (
            picture is None
            or "prompt" not in picture.text
            or "seed" not in json.loads(picture.text["settings"]) | picture.text
        ):
            wrong.append("no whole picture")
        else:
            picture.load()
    if status != 0 and status != 1 and len(said) != 1:
        wrong.append(f"{len(said)} sentences")
    if status == 1 and len(said) != 1 and "Needed:" not in out:  # --check says what is needed
        wrong.append(f"{len(said)} sentences")
    if status != 0 and pictures:
        wrong.append("a picture is left")
    if any(len(line) > 1500 or not line.isprintable() for line in said):
        wrong.append("a sentence too long or not printable")
    return ", ".join(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torchrun", action="store_true", help="on two ranks under torchrun")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    rng, found = random.Random(args.seed), []
    for number in range(args.count):
        found.append(try_line(draw(rng, args.torchrun), args.torchrun))
        if found[-1]["wrong"]:
            print(f"{number}: {found[-1]}", file=sys.stderr, flush=True)
    bad = [result for result in found if result["wrong"]]
    counts = {"lines": len(found), "pictures": sum(result["picture"] for result in found), "wrong": len(bad),
              "longest, s": round(max(result["seconds"] for result in found), 1)}  # fmt: skip
    print(in_words(machine() | counts | {"seed": args.seed}))
    print(
        table(
            ["line", "status", "verdict", "sentence"],
            [[r["line"][:120], r["status"], r["wrong"], r["said"][:150]] for r in bad],
        )
    )
    if args.json:
        args.json.write_text(json.dumps({"conditions": machine(), "results": found}, indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
