"""What starting kernels one by one costs on a GPU: every part of the full-size networks as Python runs it, and replayed as a CUDA graph.

`python benchmarks/timing/graphs.py --sizes 512 1024`, fp16, random weights. A graph is one pass over a part, recorded once; a replay starts all its kernels at
once and must give the same prediction, bit for bit. The sampler here does not use them: this says what it would be worth.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

from benchmarks.common import FAMILIES, in_words, machine, table  # noqa: E402
from benchmarks.speed import predict, show_prediction  # noqa: E402
from benchmarks.timing.gpu_tools import Recording  # noqa: E402
from benchmarks.timing.timed import runs_of, time_runs  # noqa: E402
from hybridiff.distributed.transport import LocalTransport  # noqa: E402
from hybridiff.partition import partition  # noqa: E402
from tests.full_size import make_task  # noqa: E402


@torch.inference_mode()
def measure(family: str, size: int, repeats: int) -> dict[str, object]:
    """{"plain": seconds of every part that `timed.runs_of` has, "graph": the same, "equal": whether whole predictions are}."""
    task = make_task(family, size, 2, torch.float16, device="cuda")
    runs = runs_of(task, partition(task.denoiser, 2))
    recorded = {part: Recording(run, True) for part, run in runs.items()}
    ways = {"plain": runs, "graph": {part: recording.replay for part, recording in recorded.items()}}
    found = {
        how: {
            part: median(times[1:])
            for part, times in time_runs(by, LocalTransport(), repeats + 1, True).items()
        }
        for how, by in ways.items()
    }
    found["equal"] = all(
        torch.equal(runs[part](), recorded[part].result) for part in ("whole", "whole, batch 2")
    )
    return found


def show(family: str, size: int, found: dict[str, object]) -> str:
    """Milliseconds of the parts, and the speed-ups that two such devices would have over one, both without graphs or both with them."""
    parts = [[part, *(1000 * found[how][part] for how in ("plain", "graph"))] for part in found["plain"]]
    same = "equal" if found["equal"] else "NOT EQUAL"
    text = f"## {family}, {size} pixels a side; predictions of both ways: {same}\n\n{table(['part', 'plain, ms', 'graph, ms'], parts)}\n"
    for how in ("plain", "graph"):
        text += f"\n{how}: {show_prediction({size: predict(family, size, 50, found[how], False)})}\n"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024], help="pixels a side, multiples of 32")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where the results go; with --show, where they come from"
    )
    parser.add_argument("--show", action="store_true", help="measure nothing, print what --json FILE holds")
    args = parser.parse_args()
    if args.show:
        kept = (
            json.loads(args.json.read_text())
            if args.json and args.json.is_file()
            else parser.error("--show: give --json FILE too, a file that this script wrote.")
        )
    elif not torch.cuda.is_available():
        parser.error("there is no CUDA device here.")
    else:
        pairs = [(family, size) for family in FAMILIES for size in args.sizes]
        kept = {
            "conditions": machine()
            | {"CUDA device": f"{torch.cuda.get_device_name()}, float16", "repeats": args.repeats},
            "results": {},
        }
        kept["results"] = {f"{family} {size}": measure(family, size, args.repeats) for family, size in pairs}
        if args.json:
            args.json.write_text(json.dumps(kept, indent=1) + "\n")
    print(in_words(kept["conditions"]) + "\n")
    for name, found in kept["results"].items():
        family, size = name.split()
        print(show(family, int(size), found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
