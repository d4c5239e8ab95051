"""Kills, stops, breaks and interrupts ranks, at every phase and at random moments: `python benchmarks/deaths.py --count 40`.

A case is a place (start, text, load, ..., save, or "any": a random moment), a way to die, a rank, with or without torchrun. Without torchrun, which would end
the others itself, the others must end by themselves within --limit seconds (where nothing can be seen of the death, as of a stopped rank, after
--timeout), with an exit status other than 0 and one sentence each, or have finished before. After Ctrl-C all must end within 5
seconds, with one line. Nothing may be left over: no process, no port, no part of a file. `--count 0` runs the whole matrix.
"""

import argparse
import itertools
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
from typing import NamedTuple

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from benchmarks.common import in_words, machine, table  # noqa: E402
from benchmarks.hardship.dying_rank import HOWS, PLACES  # noqa: E402
from tests.processes import start  # noqa: E402
from tests.tiny import free_port  # noqa: E402

SCRIPT, DYING = ROOT / "train_free_sample.py", ROOT / "benchmarks" / "hardship" / "dying_rank.py"
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP, "wait": signal.SIGINT}
INTERRUPT = 5.0  # seconds that Ctrl-C may take
TORCHRUN = 35.0  # seconds after which torchrun kills what does not end by itself


class Case(NamedTuple):
    """One death."""

    place: str  # of dying_rank.PLACES, or "any"
    how: str  # of dying_rank.HOWS; "wait" is Ctrl-C to all
    victim: int
    torchrun: bool
    after: float = 0.0  # seconds, of "any"


def held(port: int) -> bool:
    """Whether somebody listens to it."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def start_torchrun(
    options: list[str], ranks: int, folder: Path, script: tuple[str, ...], port: int
) -> subprocess.Popen:
    """The same under torchrun; all say what they say into folder/said-0."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={ranks}",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
    ]
    with open(folder / "said-0", "w") as said:
        return subprocess.Popen(
            [*launch, *script, *options], env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=said, stderr=said
        )


def left_over(folder: Path, ranks_alone: bool = False) -> list[int]:
    """Processes whose command line names the folder of a case; `ranks_alone`: but for torchrun."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            line = (place / "cmdline").read_bytes()
            if str(folder).encode() in line and not (ranks_alone and b"torch.distributed.run" in line):
                found.append(int(place.name))
        except OSError:  # it has just ended
            pass
    return found


def said_by(file: Path) -> tuple[list[str], list[str]]:
    """(every line, the lines that are sentences of ours)."""
    lines = file.read_text(errors="replace").replace("\r", "\n").splitlines() if file.exists() else []
    return lines, [
        line.partition("train_free_sample.py: ")[2]
        for line in lines
        if "train_free_sample.py: " in line and "Error" not in line.split(":")[0]
    ]


def wait_for(each: list[subprocess.Popen], seconds: float) -> None:
    """Until all have ended, or the seconds are over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(process.poll() is None for process in each):
        time.sleep(0.05)


def run_case(
    case: Case,
    folder: Path,
    ranks: int,
    given: list[str],
    timeout: float,
    limit: float,
    interrupt: float = INTERRUPT,
) -> dict:
    """One death and what came of it."""
    out, mark, port = folder / "out", folder / "mark", free_port(1)
    out.mkdir()
    options = [*given, "--seed", "1", "--timeout", str(timeout), "--out", str(out / "picture.png")]
    script = (
        (str(SCRIPT),)
        if case.place == "any"
        else (str(DYING), case.place, case.how, str(case.victim), str(mark))
    )
    each = (
        [start_torchrun(options, ranks, folder, script, port)]
        if case.torchrun
        else start([options] * ranks, folder, script, port)
    )
    others = (
        each
        if case.torchrun or case.how == "wait"
        else [rank for rank in each if rank is not each[case.victim]]
    )
    if case.place == "any":
        time.sleep(case.after)
    begun = time.monotonic()
    while (
        case.place != "any"
        and not mark.exists()
        and each[0].poll() is None
        and time.monotonic() < begun + 120
    ):
        time.sleep(0.02)
    begun = time.monotonic()
    if case.place == "any" or case.how == "wait":
        for process in each if case.torchrun or case.how == "wait" else [each[case.victim]]:
            if process.poll() is None:
                process.send_signal(SIGNALS[case.how])
    unseen = case.how == "stop" or case.place == "start" or (case.place == "any" and case.after < 8)
    allowed = (
        interrupt
        if case.how == "wait"
        else limit + (timeout if unseen else 0) + (TORCHRUN if case.torchrun else 0)
    )
    if case.torchrun and case.how == "wait":  # the ranks; torchrun takes its own time to end
        while (hung := left_over(folder, ranks_alone=True)) and time.monotonic() < begun + allowed:
            time.sleep(0.05)
        seconds = time.monotonic() - begun
        wait_for(each, TORCHRUN)
    else:
        wait_for(others, allowed)
        seconds = time.monotonic() - begun
        hung = [process for process in others if process.poll() is None]
    if not case.torchrun and case.how == "stop":
        each[case.victim].kill()  # a stopped process cannot end by itself
    wait_for(each, 10)
    left = left_over(folder)
    for process in each:
        process.kill()
        process.wait()
    for number in left:
        os.kill(number, signal.SIGKILL) if number in left_over(folder) else None
    return judge(
        case, folder, ranks, others, [process.returncode for process in each], seconds, hung, left, port
    )


def judge(
    case: Case,
    folder: Path,
    ranks: int,
    others: list,
    codes: list[int],
    seconds: float,
    hung: list,
    left: list[int],
    port: int,
) -> dict:
    """What is wrong with the end of a case."""
    told = {rank: said_by(folder / f"said-{rank}") for rank in range(1 if case.torchrun else ranks)}
    everything = [line for lines, _ in told.values() for line in lines]
    finished, wrong = all(process.returncode == 0 for process in others), []
    speakers = [rank for rank in told if case.torchrun or case.how == "wait" or rank != case.victim]
    counts = [len(told[rank][1]) for rank in speakers]
    if hung or left:
        wrong.append(f"{len(hung)} hung, {len(left)} processes left")
    if (
        not finished
        and any(process.returncode == 0 for process in others)
        and (case.place, case.victim) != ("save", 0)
    ):
        wrong.append(f"exit status {codes}")
    if case.how == "wait" and not finished and sum(counts) != 1:
        wrong.append(f"{sum(counts)} lines after Ctrl-C")
    if case.how != "wait" and not case.torchrun and not finished and counts != [1] * len(counts):
        wrong.append(f"{counts} sentences")
    if case.place != "any" and not (folder / "mark").exists():
        wrong.append("it was never reached")
    elif case.place != "any" and case.how in ("exception", "memory", "gpu memory", "allocate"):
        victim = told[0 if case.torchrun else case.victim][1]
        if not any(
            sentence.startswith(f"rank {case.victim} ") and ("failed" in sentence or "memory" in sentence)
            for sentence in victim
        ):
            wrong.append("the rank that failed does not say so")
    if any("Traceback" in line for line in everything) and not (
        case.torchrun and f'"{SCRIPT}"' not in "".join(everything)
    ):
        wrong.append("a traceback")
    files = sorted(path.name for path in (folder / "out").iterdir())
    if files == ["picture.png"]:
        Image.open(folder / "out" / "picture.png").load()
    elif files:
        wrong.append(f"left {files}")
    if held(port):
        wrong.append("the port is held")
    sentences = [sentence for rank in speakers for sentence in told[rank][1]]
    return {
        **case._asdict(),
        "seconds": seconds,
        "said": "finished before" if finished else (sentences or [""])[0],
        "wrong": ", ".join(wrong),
    }


def matrix(ranks: int) -> list[Case]:
    """Every place, way and rank, without and with torchrun."""
    return [Case(*case) for case in itertools.product(PLACES, HOWS, range(ranks), (False, True))]


def draw(rng: random.Random, ranks: int, count: int, seconds: float) -> list[Case]:
    """A third at random moments, the others from the matrix; the whole matrix for a count of 0."""
    moments = [
        Case("any", rng.choice(list(SIGNALS)), rng.randrange(ranks), False, rng.uniform(0.5, seconds))
        for _ in range(count // 3)
    ]
    return matrix(ranks) if count == 0 else rng.sample(matrix(ranks), count - len(moments)) + moments


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--count", type=int, default=40, help="0: the whole matrix")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--options",
        help="of the command line (default: 12 steps by preset paper for 2 ranks, without guidance for more)",
    )
    parser.add_argument("--seconds", type=float, default=15.0, help="the latest of the random moments")
    parser.add_argument("--timeout", type=float, default=5.0, help="the ranks' --timeout")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds that the others may take to end")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    usual = "--preset paper --cap 4 --interval 3 --steps 12" if args.ranks == 2 else "--guidance 1 --steps 12"
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job ignores it, and so would the ranks
    found, cases = [], draw(random.Random(args.seed), args.ranks, args.count, args.seconds)
    for number, case in enumerate(cases):
        with tempfile.TemporaryDirectory() as name:
            found.append(
                run_case(
                    case, Path(name), args.ranks, (args.options or usual).split(), args.timeout, args.limit
                )
            )
        print(f"{number + 1}/{len(cases)} {found[-1]}", file=sys.stderr, flush=True)
    lines = [[r["place"] if r["place"] != "any" else f"after {r['after']:.1f} s", r["how"], r["victim"], "yes" if r["torchrun"] else "", f"{r['seconds']:.1f}",
              r["wrong"] or "as it should be", r["said"][:110]] for r in found]  # fmt: skip
    print(
        in_words(
            machine()
            | {
                "ranks": args.ranks,
                "timeout": args.timeout,
                "cases": len(found),
                "wrong": sum(bool(r["wrong"]) for r in found),
            }
        )
    )
    print(
        "\n"
        + table(
            ["place", "how", "rank", "torchrun", "ended within, s", "verdict", "the first sentence"], lines
        )
    )
    if args.json:
        args.json.write_text(json.dumps({"conditions": machine(), "results": found}, indent=1) + "\n")
    return 1 if any(result["wrong"] for result in found) else 0


if __name__ == "__main__":
    sys.exit(main())
