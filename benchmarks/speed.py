"""Speed of whole runs against the schedule's arithmetic: `python benchmarks/speed.py --json FILE`.

The full-size SDXL U-Net and SD3-medium MMDiT with seeded random weights on the CPU, in bf16 if
it multiplies that faster, else in fp32 (10 GB for SDXL, which the ranks share as a file in the temporary folder), one thread a rank. Rows:
`serial`, `batched` and `diffusers` (its own pipeline on the same weights) on one rank; `condition`, the presets `balanced` and `fast`, `paper-K` (K pipelined
steps after the one that fills), `fewer-K` (condition partitioning with so few steps that it is ideally as fast as paper-K), and `step-extrapolation-N`,
`inner-reuse-N` and `guided-pipeline-N` (N saved steps) on two. Every result is written to FILE at once, and what FILE has is not measured again. Ideal: the schedule's
arithmetic from the times of the parts that a row uses, taken by the same processes right before and after the row, of which the slower rank's counts;
messages are free. With --cuda, part times there and from them a predicted latency on two such devices.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import FAMILIES, SHARES, in_words, intervals, machine, row_plan, table  # noqa: E402
from benchmarks.timing.timed import (  # noqa: E402
    PARTS,
    on_ranks_with_task,
    part_of,
    parts_on_cuda,
    time_diffusers,
    time_run,
    warm_parts,
)
from hybridiff.app.files import write_whole  # noqa: E402
from hybridiff.cost import length, plan_all, timeline, work_of  # noqa: E402
from hybridiff.denoise import Task  # noqa: E402
from hybridiff.partition import Partition, partition  # noqa: E402
from hybridiff.presets import PRESETS, usual_reuse  # noqa: E402
from hybridiff.schedule import Name, StepPlan  # noqa: E402
from tests.full_size import TOKENS, make_task, on_meta  # noqa: E402
from weights.demo.loop import bf16_pays  # noqa: E402

SIZES = {"sdxl": 512, "sd3": 256}  # of the whole runs
LINKS = {  # bytes a second in one direction, seconds a message; assumed, the bandwidths are nominal
    "NVLink 4, 450 GB/s": (450e9, 10e-6),
    "PCIe 4.0 x16, 32 GB/s": (32e9, 20e-6),
}


def rows_of(steps: int) -> tuple[str, ...]:
    """The rows that there are at a number of steps."""
    paced = [f"{kind}-{k}" for kind in ("paper", "fewer") for k in intervals(steps)]
    presets = {
        f"{PRESETS[name].strategy}-{usual_reuse(steps, PRESETS[name].share).count}"
        for name in ("balanced", "fast")
    }
    saved = {
        f"{name}-{usual_reuse(steps, share).count}": None
        for name, shares in SHARES.items()
        for share in shares
    }
    return (
        "serial",
        "batched",
        "diffusers",
        "condition",
        "balanced",
        "fast",
        *paced,
        *(name for name in saved if name not in presets),
    )


def plans_of(family: str, row: str, steps: int, tiny: bool = False) -> tuple[list[StepPlan], Partition]:
    """The schedule of a row, or of the one it is like, and how it divides the network."""
    name = {"diffusers": "batched"}.get(row, "condition" if row.startswith("fewer") else row)
    strategy, settings = row_plan(family, name, steps, tiny=tiny)
    return plan_all(strategy, settings), strategy.partition


def ideal(
    plans: Sequence[StepPlan],
    division: Partition,
    parts: dict[str, float],
    delay: Callable[[Name], float] = lambda name: 0.0,
) -> float:
    """Seconds from start to end by the schedule alone, given the seconds of each part."""
    if len(division.spans) == 2 and "entry" in parts:  # older files time SD3's embedding by itself
        parts = parts | {"inner": parts["entry"] + parts["inner"]}
    costs = {}
    for run in {run for plan in plans for run in plan.runs()}:
        costs[work_of(run)] = parts[part_of(run, division)] / (2 if run.branch == "both" else 1)
    return length(timeline(plans, costs, delay))


def parts_used(plans: Sequence[StepPlan], division: Partition) -> list[str]:
    """Those of `timed.PARTS` that a schedule consists of."""
    return sorted({part_of(run, division) for plan in plans for run in plan.runs()})


def steps_of(family: str, row: str, steps: int, parts: dict[str, float], tiny: bool) -> int:
    """The steps of a row; fewer-K: as many as take no longer than paper-K, at least one."""
    if not row.startswith("fewer"):
        return steps
    paper = ideal(*plans_of(family, row.replace("fewer", "paper"), steps, tiny), parts)
    return max(1, int(paper / ideal(*plans_of(family, "condition", 1, tiny), parts)))


def by_medians(seconds: Sequence[float], plans: Sequence[StepPlan]) -> float:
    """Sum over the kinds of steps (equal plans) of the median times their number."""
    kinds: dict[StepPlan, list[float]] = {}
    for plan, taken in zip(plans, seconds, strict=True):
        kinds.setdefault(plan, []).append(taken)
    return sum(median(times) * len(times) for times in kinds.values())


class Results:
    """What has been measured, in memory and in the file; a result is written as soon as it is there."""

    def __init__(self, path: Path | None, conditions: dict):
        self.path, self.conditions, self.found = path, conditions, {}
        if path and path.exists():
            kept = json.loads(path.read_text())
            if kept["conditions"] != conditions:
                raise ValueError("it was measured under other conditions")
            self.found = kept["results"]

    def once(self, key: str, measure: Callable[[], dict]) -> dict:
        """The result under this key, measured if there is none."""
        if key not in self.found:
            print(f"{time.strftime('%H:%M:%S')} {key}", file=sys.stderr, flush=True)
            load = round(os.getloadavg()[0], 2)
            self.keep(key, {"load average before": load} | measure())
        return self.found[key]

    def keep(self, key: str, result: dict) -> None:
        """Put a result under a key and write the file."""
        self.found[key] = result
        if self.path:
            told = json.dumps({"conditions": self.conditions, "results": self.found}, indent=1)
            write_whole(self.path, lambda temporary: temporary.write_text(told))


def where_of(family: str, size: int, steps: int, args: argparse.Namespace) -> dict[str, object]:
    """What a rank makes its task from, see `timed.with_task`."""
    return {
        "family": family,
        "size": size,
        "steps": steps,
        "dtype": args.dtype,
        "tiny": args.tiny,
        "weights": str(args.folder / family),
    }


def slower(each: Sequence[dict[str, list[float]]]) -> dict[str, float]:
    """Seconds of each part until the slowest rank has it, medians, from every rank's times."""
    return {part: median(map(max, zip(*(seconds[part] for seconds in each)))) for part in each[0]}


def measure_parts(
    results: Results, family: str, size: int, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """ "1 rank busy" and "2 ranks busy" -> seconds of each part until all have it, medians."""
    where = where_of(family, size, 1, args)
    details = {"division": partition(on_meta(family, args.tiny), 2), "repeats": args.repeats}

    def measure() -> dict:
        busy = {}
        for ranks in (1, 2):
            busy[f"{ranks} ranks busy" if ranks > 1 else "1 rank busy"] = slower(
                on_ranks_with_task(ranks, where, warm_parts, **details)
            )
        return busy

    return results.once(f"{family} {size} parts", measure)


def measure_row(
    results: Results, family: str, size: int, row: str, parts: dict, args: argparse.Namespace
) -> dict:
    """One row: seconds measured and ideal, of every step and of the parts, bytes. `parts`: by them fewer-K has its steps."""

    def measure() -> dict:
        ranks = 1 if row in ("serial", "batched", "diffusers") else 2
        steps = steps_of(family, row, args.steps, parts["2 ranks busy"], args.tiny)
        plans, division = plans_of(family, row, steps, args.tiny)
        alike = len(set(plans)) == 1  # every step does the same work, so that some stand for all
        run = min(steps, args.alike) if alike and args.alike else steps
        where = where_of(family, size, run, args)
        if row == "diffusers":
            each = on_ranks_with_task(1, where, time_diffusers, family=family, size=size, steps=run)
        else:
            name = "condition" if row.startswith("fewer") else row
            strategy, settings = row_plan(family, name, run, tiny=args.tiny)
            details = {
                "strategy": strategy,
                "settings": settings,
                "repeats": args.repeats,
                "wanted": parts_used(plans, division),
            }
            each = on_ranks_with_task(ranks, where, time_run, **details)
        if not all(result["finite"] for result in each):
            raise SystemExit(
                f"{family} {row}: latents are not finite, so the times mean nothing and are not kept."
            )
        beside = None if row == "diffusers" else slower([result["parts"] for result in each])
        return {
            "ranks": ranks, "steps": steps, "steps run": run, "total": max(result["total"] for result in each) * steps / run,
            "medians": max(by_medians(result["seconds"], plans[:run]) for result in each) * steps / run,
            "ideal": ideal(plans, division, beside) if beside else None, "parts beside it": beside,
            "bytes": {kind: count * steps // run for kind, count in each[0]["bytes"].items()}, "seconds of each step": [result["seconds"] for result in each],
            **({"distance from our prediction": each[0]["difference"]} if row == "diffusers" else {}),
        }  # fmt: skip

    return results.once(f"{family} {size} {args.steps} steps {row}", measure)


def show_parts(parts: dict[int, dict]) -> str:
    """Part times by size, and the most that any division over two ranks can gain at that size."""
    lines = []
    for size, found in parts.items():
        baseline = min(2 * found["1 rank busy"]["whole"], found["1 rank busy"]["whole, batch 2"])
        for busy in ("1 rank busy", "2 ranks busy"):
            seconds = found[busy]
            gain = seconds["whole, batch 2"] / (2 * seconds["whole"])
            split = baseline / seconds["whole"] if busy == "2 ranks busy" else None
            lines.append([size, busy, *(seconds.get(part) for part in PARTS), gain, split])
    header = [
        "pixels",
        "",
        *(f"{part}, s" for part in PARTS),
        "batch 2 / two runs",
        "ideal speed-up of condition",
    ]
    note = "Speed-up over the faster of two runs and one batch of two on one rank. "
    note += "Where batching is cheap, no split reaches 2."
    return f"{table(header, lines)}\n\n{note}"


def show_rows(rows: dict[str, dict]) -> str:
    """Measured against ideal; speed-up over the faster of serial and batched, where both are there."""
    ours = [rows[name]["total"] for name in ("serial", "batched") if name in rows]
    baseline = min(ours) if len(ours) == 2 else None
    lines = []
    for name, r in rows.items():
        above = [None if r["ideal"] is None else r[which] / r["ideal"] for which in ("total", "medians")]
        faster = None if baseline is None else baseline / r["total"]
        seconds = [r[which] for which in ("total", "medians", "ideal")]
        told = (
            str(r["steps"]) if r["steps run"] == r["steps"] else f"{r['steps']}, of {r['steps run']} measured"
        )
        lines.append([name, r["ranks"], told, *seconds, *above, faster, sum(r["bytes"].values())])
    header = ["row", "ranks", "steps", "measured, s", "by medians, s", "ideal, s", "measured / ideal", "by medians / ideal",
              "speed-up", "bytes"]  # fmt: skip
    text = table(header, lines)
    if baseline is not None and "diffusers" in rows:
        theirs = rows["diffusers"]
        text += (
            f"\n\nThe faster of serial and batched takes {baseline / theirs['total']:.3f} of diffusers' time"
        )
        text += (
            f" (one prediction of theirs differs from ours by {theirs['distance from our prediction']:.1e})."
        )
    return text


def delay_over(link: str, task: Task) -> Callable[[Name], float]:
    """Seconds that a message takes over one of LINKS."""
    bandwidth, latency = LINKS[link]
    return lambda name: latency + task.size(name) / bandwidth


def predict(
    family: str, size: int, steps: int, parts: dict[str, float], tiny: bool
) -> dict[str, dict[str, float]]:
    """Row -> link -> predicted seconds on two devices with these part times, each fp16 message over its link in turn."""
    task, predicted = make_task(family, size, steps, torch.float16, tiny), {}
    for row in (
        "serial",
        "batched",
        "condition",
        "balanced",
        "fast",
        *(f"paper-{k}" for k in intervals(steps)),
    ):
        schedule = plans_of(family, row, steps, tiny)
        predicted[row] = {link: ideal(*schedule, parts, delay_over(link, task)) for link in LINKS}
    return predicted


def show_prediction(predicted: dict[int, dict[str, dict[str, float]]]) -> str:
    """Predicted seconds and speed-up over the faster of serial and batched."""
    lines = []
    for size, rows in predicted.items():
        for row, links in rows.items():
            best = {link: min(rows["serial"][link], rows["batched"][link]) for link in links}
            lines.append([size, row, *(value for link, s in links.items() for value in (s, best[link] / s))])
    header = [
        "pixels",
        "row",
        *(f"{link}: {what}" for link in LINKS for what in ("predicted s", "predicted speed-up")),
    ]
    title = "PREDICTION, not measured: part times of one device put through the schedule; networks and messages alone"
    return f"{title}, links assumed\n\n{table(header, lines)}"


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument(
        "--size", type=int, help="pixels a side of the whole runs; default 512 for sdxl, 256 for sd3"
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument(
        "--alike", type=int, metavar="N", help="of rows whose steps all do the same work, run N and multiply"
    )
    parser.add_argument("--rows", nargs="*", metavar="ROW", help=f"with 50 steps of {', '.join(rows_of(50))}")
    parser.add_argument("--part-sizes", nargs="*", type=int, default=[256, 512, 1024], metavar="SIZE")
    parser.add_argument("--repeats", type=int, default=5, help="of every part")
    parser.add_argument(
        "--cuda", nargs="*", type=int, metavar="SIZE", help="part times on CUDA; default 1024 2048 2560"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="results are kept there, and not measured again"
    )
    parser.add_argument("--tiny", action="store_true", help="small networks, for the test")
    args = parser.parse_args()
    args.cuda = [1024, 2048, 2560] if args.cuda == [] else args.cuda or []
    for size in (*args.part_sizes, *args.cuda, *([] if args.size is None else [args.size])):
        if size < 32 or size % 32 or size > 3072:
            parser.error(
                f"a side of {size} pixels does not fit the networks: give a multiple of 32 from 32 to 3072."
            )
    if not 2 <= args.steps < 1000 or args.repeats < 1 or (args.alike is not None and args.alike < 1):
        parser.error("give 2 to 999 --steps and at least one of --repeats and --alike.")
    known = rows_of(args.steps)
    for row in args.rows or ():
        if row not in known:
            parser.error(
                f"--rows: there is no {row} with {args.steps} steps; give some of {', '.join(known)}."
            )
    args.rows = [row for row in known if args.rows is None or row in args.rows]
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: its folder does not exist; make it or give another.")
    if args.cuda and not torch.cuda.is_available():
        parser.error("--cuda: there is no CUDA device here; leave the option out.")
    args.dtype = torch.bfloat16 if bf16_pays(torch.device("cpu")) else torch.float32
    return args


def main() -> int:
    args = arguments()
    conditions = machine() | {
        "text tokens": TOKENS, "networks": "tiny" if args.tiny else "full size", "dtype": f"{args.dtype} on the CPU".removeprefix("torch."),
        "threads a rank": 1, "steps run of rows whose steps are alike": args.alike or "all", "repeats of a part": args.repeats, "switch": "by the cap",
        "ideal": "from parts timed beside each row", **{row: PRESETS[row].words for row in ("balanced", "fast")},
    }  # fmt: skip
    if torch.cuda.is_available():
        conditions["CUDA device"] = f"{torch.cuda.get_device_name()}, float16"
    try:
        results = Results(args.json, conditions)
    except (OSError, ValueError, LookupError, TypeError) as problem:
        print(f"{args.json} cannot be continued ({problem}): give another --json file.", file=sys.stderr)
        return 2
    print(in_words(conditions))
    with tempfile.TemporaryDirectory() as folder:  # of the weights
        args.folder = Path(folder)
        measure_all(results, args)
    return 0


def measure_all(results: Results, args: argparse.Namespace) -> None:
    """Measures and prints what was asked for, family by family."""
    for family in args.family:
        size = args.size or SIZES[family]
        wanted = sorted({*args.part_sizes, *([size] if args.rows else [])})
        parts = {side: measure_parts(results, family, side, args) for side in wanted}
        if parts:
            print(
                f"\n## {family}: one evaluation of the network and its parts\n\n{show_parts(parts)}",
                flush=True,
            )
        rows = {row: measure_row(results, family, size, row, parts[size], args) for row in args.rows}
        if rows:
            print(
                f"\n## {family}: whole runs of {args.steps} steps at {size} x {size}\n\n{show_rows(rows)}",
                flush=True,
            )
        predicted = {}
        for side in args.cuda:
            key, on_cuda = f"{family} {side} cuda parts", (family, side, args.repeats, args.tiny)
            found = results.once(key, partial(parts_on_cuda, *on_cuda))
            predicted[side] = predict(family, side, args.steps, found, args.tiny)
            results.keep(
                f"{family} {side} {args.steps} steps PREDICTED for two CUDA devices", predicted[side]
            )
        if predicted:
            print(
                f"\n## {family}: {args.steps} steps on two CUDA devices\n\n{show_prediction(predicted)}",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
