"""What starting kernels one by one costs on a GPU: every part of the full-size networks as Python runs it, and replayed as a CUDA graph.

`python benchmarks/graphs.py --sizes 512 1024`, fp16, random weights. A graph is one pass over a part, recorded once; a replay starts all its kernels at
once and must give the same prediction, bit for bit. The sampler here does not use them: this says what it would be worth.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Callable

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from benchmarks.full_size import FAMILIES, in_words, machine, make_task, table  # noqa: E402
from benchmarks.speed import predict  # noqa: E402

ROWS = ("condition", "balanced", "fast", "paper-5", "paper-20")


def seconds(run: Callable, repeats: int) -> float:
    """Median of `repeats` runs after one that does not count."""
    taken = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return median(taken[1:])


def record(run: Callable) -> tuple[torch.cuda.CUDAGraph, object]:
    """A graph of what `run` starts, and the result, which every replay writes anew."""
    side = torch.cuda.Stream()  # cuBLAS and cuDNN make their choices here, which may not happen while recording
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


@torch.inference_mode()
def measure(family: str, size: int, repeats: int) -> dict[str, object]:
    """{"plain": seconds of every part of `timed.PARTS`, "graph": the same, "equal": whether whole predictions are}."""
    task = make_task(family, size, 2, torch.float16, device="cuda")
    net, cut, told, both = task.denoiser, task.cuts[0], task.conditioning["cond"], task.batch("both")
    x, t = task.noise.half(), task.sampler.timesteps[:1].cuda()
    pair, times = x.repeat(2, 1, 1, 1), t.repeat(2)
    crossing, skips = net.entry(x, t, told, cut)
    deep = net.inner(crossing, t, told, cut)
    runs = {
        "entry": lambda: net.entry(x, t, told, cut), "inner": lambda: net.inner(crossing, t, told, cut),
        "exit": lambda: net.exit(deep, skips, t, told, cut), "whole": lambda: net(x, t, told), "whole, batch 2": lambda: net(pair, times, both),
    }  # fmt: skip
    found = {"plain": {}, "graph": {}, "equal": True}
    for part, run in runs.items():
        found["plain"][part] = seconds(run, repeats)
        graph, result = record(run)
        found["graph"][part] = seconds(graph.replay, repeats)
        if part.startswith("whole"):
            found["equal"] &= torch.equal(run(), result)
    return found


def show(family: str, size: int, found: dict[str, object]) -> str:
    """Milliseconds of the parts, and the speed-ups that two such devices would have over one, both with graphs or both without."""
    parts = [[part, *(1000 * found[how][part] for how in ("plain", "graph"))] for part in found["plain"]]
    lines = []
    for how in ("plain", "graph"):
        rows = {row: next(iter(links.values())) for row, links in predict(family, size, 50, found[how], False).items()}
        one = min(rows["serial"], rows["batched"])
        lines.append([how, one, *(one / rows[row] for row in ROWS)])
    same = "equal" if found["equal"] else "NOT EQUAL"
    return (f"## {family}, {size} pixels a side; predictions of both ways: {same}\n\n{table(['part', 'plain, ms', 'graph, ms'], parts)}\n\n"
            f"PREDICTED for two devices, 50 steps: times as fast as one\n\n{table(['', 'one device, s', *ROWS], lines)}\n")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024], help="pixels a side, multiples of 32")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go; with --show, where they come from")
    parser.add_argument("--show", action="store_true", help="measure nothing, print what --json FILE holds")
    args = parser.parse_args()
    if args.show:
        kept = json.loads(args.json.read_text()) if args.json and args.json.is_file() else parser.error("--show: give --json FILE too, a file that this script wrote.")
    elif not torch.cuda.is_available():
        parser.error("there is no CUDA device here.")
    else:
        pairs = [(family, size) for family in FAMILIES for size in args.sizes]
        kept = {"conditions": machine() | {"CUDA device": f"{torch.cuda.get_device_name()}, float16", "repeats": args.repeats}, "results": {}}
        kept["results"] = {f"{family} {size}": measure(family, size, args.repeats) for family, size in pairs}
        if args.json:
            args.json.write_text(json.dumps(kept, indent=1) + "\n")
    print(in_words(kept["conditions"]) + "\n")
    for name, found in kept["results"].items():
        print(show(*name.split()[:1], int(name.split()[1]), found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
