"""How many pictures N ranks make in the time of two: `python benchmarks/timing/throughput.py`.

The parts of the network sleep instead of computing, so that ranks need no core of their own: what is measured is everything else, the
schedule, the messages, who takes which picture when. Beside it stands the schedule's own arithmetic, where nothing but the network takes time.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import in_words, machine, row_plan, table  # noqa: E402
from hybridiff.app.batch import Job, take_turns  # noqa: E402
from hybridiff.cost import Costs, length, part_costs, plan_all, timeline  # noqa: E402
from hybridiff.denoise import Task, denoise  # noqa: E402
from hybridiff.distributed.transport import connect, disconnect  # noqa: E402
from tests.tiny import free_port, make_task  # noqa: E402


def asleep(task: Task, shares: Costs, seconds: float) -> Task:
    """The same task, whose network also sleeps: `seconds` for a whole evaluation, a span's share of its floating-point operations for a span."""
    net = task.denoiser

    class Sleeping(type(net)):
        def run(self, span, *given):
            time.sleep(seconds * shares[span])
            return super().run(span, *given)

    net.__class__ = Sleeping
    return task


def rank_main(rank: int, ranks: int, port: int, args: argparse.Namespace, shares: Costs, folder: str) -> None:
    """One rank: makes the pictures that fall to its team."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    transport = connect(timedelta(seconds=120))
    transport.divide(2)
    transport.open_channels(torch.device("cpu"))
    task = asleep(make_task(args.family, args.steps), shares, args.seconds)
    strategy, settings = row_plan(args.family, args.row, args.steps)
    strategy = strategy.on(task.denoiser)
    jobs, made = [Job(n, Path(), {}) for n in range(args.pictures)], []
    transport.wait_for_all()
    start = time.perf_counter()
    for job in take_turns(jobs, transport):
        for _ in denoise(task, strategy, settings, transport):
            transport.add("steps") if transport.rank == 0 else None
        transport.flush()
        made.append(job.number)
    seconds = time.perf_counter() - start
    (Path(folder) / f"{ranks}-{rank}.json").write_text(
        json.dumps({"seconds": seconds, "team": transport.replica, "made": made})
    )
    disconnect()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--family", choices=("sdxl", "sd3"), default="sdxl")
    parser.add_argument("--row", default="condition", help="condition, paper-K, balanced or fast")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=0.3, help="that an evaluation of the network sleeps")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    strategy, settings = row_plan(args.family, args.row, args.steps)
    task = make_task(args.family, args.steps)
    task = replace(task, denoiser=task.denoiser.to("meta"))
    strategy = strategy.on(task.denoiser)
    shares = part_costs(task, strategy)
    one = length(timeline(plan_all(strategy, settings), shares)) * args.seconds
    rows, base = [], None
    with tempfile.TemporaryDirectory() as folder:
        for ranks in args.ranks:
            mp.spawn(rank_main, (ranks, free_port(1), args, shares, folder), nprocs=ranks)
            told = [json.loads((Path(folder) / f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)]
            made = sorted({number for t in told for number in t["made"]})
            assert made == list(range(args.pictures)), f"made {made}"
            seconds = max(t["seconds"] for t in told)
            ideal = one * -(-args.pictures // (ranks // 2))
            base = base or (seconds, ideal)
            rows.append(
                [ranks, ranks // 2, seconds, 60 * args.pictures / seconds, base[0] / seconds, base[1] / ideal]
            )
    conditions = machine() | {
        "family": args.family,
        "row": args.row,
        "pictures": args.pictures,
        "steps": args.steps,
        "an evaluation sleeps": args.seconds,
    }
    print(in_words(conditions))
    print(
        "\n"
        + table(
            ["ranks", "teams", "seconds", "pictures a minute", "times the first row", "by the schedule"], rows
        )
    )
    if args.json:
        args.json.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
