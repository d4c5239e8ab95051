"""Bytes that travel for one picture, from the schedule alone: `python benchmarks/bytes.py`.

SDXL and SD3-medium (333 text tokens) in 50 steps at 1024 x 1024 in fp16; shapes only, no weights, nothing is computed.
tests/benchmarks/test_benchmarks.py and tests/method/test_cost.py hold the same arithmetic against what the transport counts.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import FAMILIES, in_words, intervals, row_plan, table  # noqa: E402
from hybridiff.cost import length, part_costs, plan_all, timeline, total_bytes  # noqa: E402
from hybridiff.switching import MIDDLE  # noqa: E402
from tests.full_size import TOKENS, make_task  # noqa: E402

# Jung et al., arXiv 2602.21760, Table 1: "comm. (GB)" of a picture at 1024 x 1024, two GPUs, T = 50. They are GiB and count
# all-reduces within one rank too; of SDXL's 0.516, messages between the ranks are 0.504 (counted in their released code).
GIB = 2**30
PUBLISHED = {("sdxl", "paper-5"): 0.516 * GIB, ("sd3", "paper-5"): 0.189 * GIB}
ALSO_PUBLISHED = {  # of the same table, for scale
    "sdxl": {"DistriFusion": 0.525 * GIB, "AsyncDiff, stride 1": 9.830 * GIB},
    "sd3": {"AsyncDiff, stride 1": 1.290 * GIB, "xDiT ring": 121.646 * GIB, "ParaStep": 0.032 * GIB},
}
TARGETS = {
    ("sdxl", "paper-5"): 0.04e9,
    ("sd3", "paper-5"): 0.12e9,
}  # at most, bytes, under the default conditions
ROWS = ("condition", "balanced", *(f"paper-{k}" for k in intervals(50)))
KINDS = ("prediction", "keys", "features", "discrepancy")


def count(family: str, row: str, size: int, steps: int, tiny: bool, ranks: int) -> dict:
    """Bytes by kind of one picture, its ideal speed-up over serial by floating-point operations, and what its schedule is."""
    strategy, settings = row_plan(family, row, steps, ranks, tiny)
    plans = plan_all(strategy, settings)
    task = make_task(family, size, steps, torch.float16, tiny)
    sent, cost = total_bytes(plans, task), length(timeline(plans, part_costs(task, strategy, plans)))
    pipelined = [step for step, plan in enumerate(plans) if plan.stage in MIDDLE]
    span = {"first pipelined step": pipelined[0], "last pipelined step": pipelined[-1]} if pipelined else {}
    return {"bytes": sent.total(), "by kind": dict(sent), "ideal speed-up": 2 * steps / cost, **span}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=1024, help="pixels a side")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2, help="that make the picture together")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--tiny", action="store_true", help="small networks, for the test")
    args = parser.parse_args()
    if args.size < 32 or args.size % 32 or args.size > 3072:
        parser.error(f"--size {args.size} does not fit the networks: give a multiple of 32 from 32 to 3072.")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: its folder does not exist; make it or give another.")
    if not 2 <= args.steps < 1000:
        parser.error(f"--steps {args.steps} is out of range: give a number from 2 to 999.")
    if args.ranks not in (2, 4, 6, 8):
        parser.error(f"--ranks {args.ranks}: give 2, 4, 6 or 8.")
    conditions = {"size": args.size, "steps": args.steps, "dtype": "float16", "ranks": args.ranks, "pictures": 1,
                  "switch": "by the cap", "text tokens": TOKENS,
                  "networks": "tiny" if args.tiny else "full size"}  # fmt: skip
    print(in_words(conditions))
    print("\nGB = 10^9 bytes, over all ranks. The paper's figures are GiB, turned into GB here.\n")
    asked = args.size, args.steps, args.tiny, args.ranks
    results = {family: {row: count(family, row, *asked) for row in ROWS} for family in FAMILIES}
    usual = asked == (1024, 50, False, 2)  # the conditions of the targets and of the paper's table
    lines, met = [], True
    for family, rows in results.items():
        for row, result in rows.items():
            first, last = (result.get(f"{which} pipelined step") for which in ("first", "last"))
            target, published = (
                known.get((family, row)) if usual else None for known in (TARGETS, PUBLISHED)
            )
            result |= {"target": target, "published": published}
            within = target is None or result["bytes"] <= target
            met &= within
            verdict = None if target is None else f"{target / 1e9:.2f}, {'met' if within else 'MISSED'}"
            kinds = [f"{result['by kind'].get(kind, 0):,}" for kind in KINDS]
            steps = None if first is None else f"{first} to {last}"
            paper = None if published is None else published / 1e9
            told = f"{result['bytes'] / 1e9:.4f}", f"{result['ideal speed-up']:.2f}"
            lines.append([family, row, steps, *kinds, *told, verdict, paper])
    kinds = [f"{kind}, bytes" for kind in KINDS]
    print(
        table(
            ["model", "row", "pipelined steps", *kinds, "GB", "ideal speed-up", "at most", "paper, GB"], lines
        )
    )
    if usual:
        others = [
            [family, name, value / 1e9]
            for family, known in ALSO_PUBLISHED.items()
            for name, value in known.items()
        ]
        print("\nOther methods as the paper's Table 1 (arXiv 2602.21760) has them\n")
        print(table(["model", "method", "GB"], others))
    if args.json:
        args.json.write_text(json.dumps({"conditions": conditions, "results": results}, indent=1))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
