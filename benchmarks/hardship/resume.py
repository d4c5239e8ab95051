"""Kills a batch at random moments and resumes it until it is done, many times over: `python benchmarks/hardship/resume.py --count 5`.

Each round starts a batch on two pairs of ranks, kills all of it after a random time, and goes on with --resume, until a run ends by itself.
Then every picture must be there, none made twice, and each equal, pixel by pixel, to the one of an uncut run.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

from benchmarks.common import in_words, machine, table  # noqa: E402

SCRIPT = ROOT / "train_free_sample.py"
PROMPTS = (
    "a large red circle on a blue background",
    "a small green star on a white background",
    "a large orange ring on a black background",
)


def batch(folder: Path, options: list[str], ranks: int, cut: float | None) -> bool:
    """Run (or resume) the batch; with `cut`, kill all its processes after so many seconds. Whether it ended by itself, and well."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        str(SCRIPT),
    ]
    with open(folder.parent / "said", "a") as said:
        run = subprocess.Popen(
            [*launch, *options, "--out", str(folder)], stdout=said, stderr=said, start_new_session=True
        )
    try:
        return run.wait(cut) == 0
    except subprocess.TimeoutExpired:
        for line in subprocess.run(
            ["ps", "-e", "-o", "pid=,args="], capture_output=True, text=True
        ).stdout.splitlines():
            pid, _, words = line.strip().partition(" ")
            if str(folder) in words:
                os.kill(int(pid), signal.SIGKILL)
        run.wait()
        return False


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--count", type=int, default=5, help="batches")
    parser.add_argument("--each", type=int, default=4, help="pictures of each of three prompts")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=40.0, help="the latest moment of a kill")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    rng, rows = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as name:
        options = [
            "--steps",
            str(args.steps),
            "--seed",
            str(args.seed),
            "--images-per-prompt",
            str(args.each),
        ]
        options += [word for prompt in PROMPTS for word in ("--prompt", prompt)]
        whole = Path(name) / "whole"
        assert batch(whole, options, args.ranks, None), (Path(name) / "said").read_text()
        for number in range(args.count):
            folder, kills, wrong, seen = Path(name) / f"cut-{number}", 0, [], {}
            while not batch(folder, [*options, "--resume"], args.ranks, rng.uniform(5, args.seconds)):
                kills += 1
                for picture in folder.glob("0*.png"):
                    if (
                        seen.setdefault(picture.name, picture.stat().st_mtime_ns)
                        != picture.stat().st_mtime_ns
                    ):
                        wrong.append(f"{picture.name} was made twice")
                time.sleep(0.2)
            expected = sorted(path.name for path in whole.iterdir())
            if sorted(path.name for path in folder.iterdir()) != expected:
                wrong.append(f"holds {sorted(path.name for path in folder.iterdir())}")
            wrong += [
                f"{name} was made twice"
                for name, made in seen.items()
                if (folder / name).stat().st_mtime_ns != made
            ]
            wrong += [
                f"{path.name} differs"
                for path in whole.glob("0*.png")
                if Image.open(path).tobytes() != Image.open(folder / path.name).tobytes()
            ]
            lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()][1:]
            if sorted(line["number"] for line in lines) != list(range(3 * args.each)):
                wrong.append("its manifest does not list every picture once")
            rows.append([number, kills, len(seen), ", ".join(wrong) or "as it should be"])
            print(rows[-1], file=sys.stderr, flush=True)
    conditions = machine() | {"ranks": args.ranks, "pictures": 3 * args.each, "steps": args.steps}
    print(
        in_words(conditions) + "\n\n" + table(["batch", "kills", "pictures kept over kills", "verdict"], rows)
    )
    if args.json:
        args.json.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")
    return 1 if any(row[-1] != "as it should be" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
