"""Kills, stops and interrupts ranks at random moments: `python benchmarks/deaths.py --count 40`.

Each case starts two ranks, without torchrun, which would end the others itself, waits for a random time, and sends a signal to one of them (an interrupt
to all, as Ctrl-C does). Then the others must end by themselves within --limit seconds (of a stopped rank: after --timeout), with an exit
status other than 0 and a sentence, or have finished before; nothing may be left over, neither a process nor a part of a file.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from benchmarks.full_size import in_words, machine, table  # noqa: E402

SCRIPT = ROOT / "train_free_sample.py"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP, signal.SIGINT)


def start(options: list[list[str]], folder: Path) -> list[subprocess.Popen]:
    """Ranks as processes of this one, each with options of its own and its words in folder/said-RANK."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    each = []
    for rank, given in enumerate(options):
        env = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(options)), "MASTER_ADDR": "127.0.0.1",
                            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}  # fmt: skip
        with open(folder / f"said-{rank}", "w") as said:
            each.append(subprocess.Popen([sys.executable, str(SCRIPT), *given], env=env, stdout=said, stderr=said))
    return each


def case(rng: random.Random, args: argparse.Namespace) -> dict:
    """One death and what came of it."""
    how, victim, delay = rng.choice(SIGNALS), rng.randrange(2), rng.uniform(0.5, args.seconds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out = folder / "out"
        out.mkdir()
        options = ["--weights", rng.choice(["demo-sdxl", "demo-sd3"]), "--preset", rng.choice(["exact", "balanced", "paper"]),
                   "--steps", str(args.steps), "--seed", "1", "--timeout", str(args.timeout), "--out", str(out / "picture.png")]  # fmt: skip
        ranks = start([options, options], folder)
        time.sleep(delay)
        begun = time.monotonic()
        for rank in ranks if how == signal.SIGINT else [ranks[victim]]:
            if rank.poll() is None:
                rank.send_signal(how)
        others = ranks if how == signal.SIGINT else [rank for rank in ranks if rank is not ranks[victim]]
        limit = args.limit + (args.timeout if how == signal.SIGSTOP else 0)
        for rank in others:
            try:
                rank.wait(max(0.1, limit - (time.monotonic() - begun)))
            except subprocess.TimeoutExpired:
                pass
        seconds = time.monotonic() - begun
        hung = [rank for rank in others if rank.poll() is None]
        for rank in ranks:
            rank.kill()
            rank.wait()
        told = (folder / f"said-{1 - victim}").read_text().replace("\r", "\n").splitlines()
        sentences = [line for line in told if line.startswith(("train_free_sample.py: ", "rank "))]
        files = sorted(path.name for path in out.iterdir())
        finished = all(rank.returncode == 0 for rank in others)
        wrong = []
        if hung:
            wrong.append("hung")
        if not finished and how != signal.SIGINT and (len(sentences) != 1 or any(rank.returncode == 0 for rank in others)):
            wrong.append(f"{len(sentences)} sentences, exit status {[rank.returncode for rank in others]}")
        if any("Traceback" in line for line in told):
            wrong.append("a traceback")
        if files not in ([], ["picture.png"]):
            wrong.append(f"left {files}")
    said = "finished before" if finished else sentences[0].removeprefix("train_free_sample.py: ") if sentences else ""
    return {"signal": how.name, "rank": "all" if how == signal.SIGINT else victim, "after": delay, "seconds": seconds, "said": said,
            "wrong": ", ".join(wrong)}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=15.0, help="the latest moment of a death")
    parser.add_argument("--timeout", type=float, default=5.0, help="the ranks' --timeout")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds that the others may take to end")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    rng, found = random.Random(args.seed), []
    for number in range(args.count):
        found.append(case(rng, args))
        print(f"{number + 1}/{args.count} {found[-1]}", file=sys.stderr, flush=True)
    lines = [[r["signal"], r["rank"], f"{r['after']:.1f}", f"{r['seconds']:.1f}", r["wrong"] or "as it should be", r["said"][:110]] for r in found]
    print(in_words(machine() | {"steps": args.steps, "timeout": args.timeout}))
    print("\n" + table(["signal", "rank", "after, s", "ended within, s", "verdict", "the other rank says"], lines))
    if args.json:
        args.json.write_text(json.dumps({"conditions": machine(), "results": found}, indent=1) + "\n")
    return 1 if any(result["wrong"] for result in found) else 0


if __name__ == "__main__":
    sys.exit(main())
