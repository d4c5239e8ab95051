"""Fidelity against speed for every strategy: `python benchmarks/frontier.py --prompts 64 --json FILE --plot FILE`.

At 50 and at 28 steps, both demo checkpoints: the strategies of ours with several numbers of saved steps, and two rulers, the paper's strategy
and condition partitioning with fewer steps (with the family's first-order sampler, and with DPM++ 2M against its own serial picture).
The column "one device" is the speed-up of the same saving without the second rank, so that the second rank's own share is seen. With
--speed FILE, a result of `benchmarks/speed.py`, the measured speed-ups of the full-size networks stand in a table of their own.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.fidelity import HEAD, Results, Row, Studio, conditions_of, fewer, line, parser_of  # noqa: E402
from benchmarks.full_size import in_words, table  # noqa: E402
from hybridiff.presets import PRESETS, paper_rule, usual_reuse  # noqa: E402
from hybridiff.samplers import SAMPLERS  # noqa: E402
from weights.load import open_checkpoint  # noqa: E402

STEPS = (50, 28)
SHARES = {"step-extrapolation": (0.1, 0.2, 0.3, 0.32, 0.4), "inner-reuse": (0.2, 0.4), "guided-pipeline": (0.2, 0.4, 0.6)}
INTERVALS = (0.1, 0.2, 0.4, 0.6)  # k of the paper's strategy, as a share of the steps
FEWER = (2.11, 2.31, 2.5, 2.86, 3.33)  # speed-ups that condition partitioning reaches with fewer steps


def rows_of(family: str, steps: int) -> list[Row]:
    """All rows at a number of steps."""
    rows = [Row("condition", "condition", steps, steps)]
    for share in INTERVALS:
        rule = replace(paper_rule(family, steps), interval=round(share * steps))
        rows.append(Row(f"paper, k = {rule.interval}", "paper", steps, steps, rule))
    for count in sorted({fewer(speed_up, steps) for speed_up in FEWER}, reverse=True):
        rows.append(Row(f"condition, {count} steps", "condition", count, steps))
        rows.append(Row(f"condition, {count} steps, dpmpp_2m", "condition", count, steps, sampler="dpmpp_2m"))
    for name, shares in SHARES.items():
        for share in shares:
            reuse = usual_reuse(steps, share)
            rows.append(Row(f"{name}, {reuse.count} steps", name, steps, steps, reuse=reuse))
    return list(dict.fromkeys(rows))  # with few steps two shares may be one number


def kind(name: str) -> str:
    """The curve that a row belongs to."""
    return "condition, fewer steps, dpmpp_2m" if "dpmpp_2m" in name else name.split(",")[0]


def one_device(found: dict[str, float], row: Row) -> str:
    """Speed-up of the same saving on one device: both branches one after the other, so half. Pipelines need two."""
    return "" if row.strategy in ("paper", "guided-pipeline") else f"{found['speed-up'] / 2:.2f}"


def plot(measured: dict[tuple[str, int], list[tuple[Row, dict]]], path: Path) -> None:
    """PSNR over ideal speed-up, a panel for each family and number of steps; thin lines are the worst picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(measured), figsize=(5 * len(measured), 5), squeeze=False, sharey=True)
    for panel, ((family, steps), rows) in zip(panels[0], measured.items()):
        curves: dict[str, list[tuple[float, float, float]]] = {}
        for row, found in rows:
            if row.name != "condition":  # equal to serial: beyond the chart
                curves.setdefault(kind(row.name), []).append((found["speed-up"], found["PSNR"], found["worst PSNR"]))
        for name, points in curves.items():
            speed, mean, worst = zip(*sorted(points))
            (drawn,) = panel.plot(speed, mean, marker="o", label="condition, fewer steps" if name == "condition" else name)
            panel.plot(speed, worst, color=drawn.get_color(), linewidth=0.8, linestyle="--")
        panel.set(title=f"demo-{family}, {steps} steps", xlabel="ideal speed-up of two ranks over serial")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("PSNR to serial, dB (dashed: the worst picture)")
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def measured_speeds(path: Path) -> str:
    """The whole runs of a result of benchmarks/speed.py as a table: speed-up over the faster of serial and batched."""
    kept = json.loads(path.read_text())
    runs = {key: found["total"] for key, found in kept["results"].items() if "total" in found}
    lines = []
    for family in ("sdxl", "sd3"):
        mine = {key.split()[-1]: seconds for key, seconds in runs.items() if key.startswith(family)}
        if "serial" in mine and "batched" in mine:
            best = min(mine["serial"], mine["batched"])
            lines += [[family, row, f"{seconds:.1f}", f"{best / seconds:.2f}"] for row, seconds in mine.items()]
    return table(("model", "row", "seconds", "measured speed-up"), lines)


def main() -> None:
    parser = parser_of(__doc__.split("\n")[0])
    parser.set_defaults(prompts=64)
    parser.add_argument("--seeds", type=int, default=2, help="pictures of each prompt")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG or SVG (needs matplotlib)")
    parser.add_argument("--speed", type=Path, metavar="FILE", help="what benchmarks/speed.py wrote")
    parser.set_defaults(steps=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = Results(args.json, conditions_of(args, seeds=args.seeds))
    print(in_words(results.conditions))
    print("\nPSNR and SSIM are those against `serial` with all steps and the same sampler; an equal picture counts as 100 dB.")
    for name, preset in PRESETS.items():
        print(f"Preset {name}: {preset.strategy}, {preset.words}.")
    measured = {}
    for family in args.family:
        studio = Studio(open_checkpoint(args.weights or f"demo-{family}"), args.prompts, [args.seed + n for n in range(args.seeds)])
        for steps in (args.steps,) if args.steps else STEPS:
            rows = rows_of(family, steps)
            found = [results.get(studio, row) for row in rows]
            measured[family, steps] = list(zip(rows, found))
            lines = [[*line(row, got), one_device(got, row)] for row, got in measured[family, steps]]
            sampler = next(iter(SAMPLERS[family]))
            print(f"\n## {family}, {steps} steps, {sampler}, guidance {studio.guidance:g}\n\n{table([*HEAD, 'one device'], lines)}", flush=True)
    if args.plot:
        plot(measured, args.plot)
    if args.speed:
        print(f"\n## Measured on the full-size networks\n\n{measured_speeds(args.speed)}")


if __name__ == "__main__":
    main()
