"""Fidelity against speed for every strategy: `python benchmarks/frontier.py --prompts 64 --json FILE --plot FILE`.

At 50 and at 28 steps, both demo checkpoints: the strategies of ours with several numbers of saved steps, and two rulers, the paper's strategy
and condition partitioning with fewer steps (with the family's first-order sampler, and with DPM++ 2M against its own serial picture).
Rows "on one device" are the same pictures at half the ideal speed, so that the second rank's own share is seen. With --speed FILE, a result of
`benchmarks/speed.py`, the speed-ups measured there, with the full-size networks, stand beside the ideal ones.
"""

import json
import sys
from dataclasses import replace
from html import escape
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import SHARES, in_words, intervals, table  # noqa: E402
from benchmarks.quality.fidelity import (
    HEAD,
    Results,
    Row,
    Studio,
    checkpoints_of,
    conditions_of,
    fewer,
    line,
    paper_row,
    parser_of,
)  # noqa: E402
from benchmarks.speed import SIZES  # noqa: E402
from hybridiff.app.report.charts import tag  # noqa: E402
from hybridiff.presets import PRESETS, usual_reuse  # noqa: E402
from hybridiff.samplers import SAMPLERS  # noqa: E402
from models import family_of  # noqa: E402

STEPS = (50, 28)


def rows_of(family: str, steps: int) -> list[Row]:
    """All rows at a number of steps; fewer steps: as fast as the paper's 2.31, and as each `step-extrapolation`."""
    rows = [
        Row("condition", "condition", steps, steps),
        *(paper_row(family, steps, k) for k in intervals(steps)),
    ]
    presets = [usual_reuse(steps, PRESETS[name].share) for name in ("balanced", "fast")]
    in_both_orders = {fewer(2.31, steps), *(steps - reuse.count for reuse in presets)}
    for count in sorted(
        in_both_orders | {steps - usual_reuse(steps, share).count for share in SHARES["step-extrapolation"]},
        reverse=True,
    ):
        rows.append(Row(f"condition, {count} steps", "condition", count, steps))
        if count in in_both_orders:
            rows.append(
                Row(f"condition, {count} steps, dpmpp_2m", "condition", count, steps, sampler="dpmpp_2m")
            )
    for name, shares in SHARES.items():
        for share in shares:
            reuse = usual_reuse(steps, share)
            rows.append(Row(f"{name}, {reuse.count} saved", name, steps, steps, reuse=reuse))
    for reuse in presets:
        rows.append(
            Row(
                f"step-extrapolation, {reuse.count} saved, dpmpp_2m",
                "step-extrapolation",
                steps,
                steps,
                reuse=reuse,
                sampler="dpmpp_2m",
            )
        )
    return list(dict.fromkeys(rows))  # with few steps two shares may be one number


def kind(row: Row) -> str:
    """The curve that a row belongs to."""
    name = row.strategy + ", fewer steps" * (row.steps < row.of) + ", dpmpp_2m" * bool(row.sampler)
    return name.replace("condition", "serial") + ", on one device" if row.name.endswith("device") else name


def on_one_device(rows: list[tuple[Row, dict]]) -> list[tuple[Row, dict]]:
    """The rows of what one device can do alone, both branches one after the other: the same pictures at half the ideal speed. Pipelines need two."""
    able = [
        (row, got)
        for row, got in rows
        if row.strategy in ("step-extrapolation", "inner-reuse", "condition") and not row.sampler
    ]
    names = [row.name.replace("condition", "serial") + ", on one device" for row, _ in able]
    return [
        (replace(row, name=name), got | {"speed-up": got["speed-up"] / 2, "measured": None})
        for (row, got), name in zip(able, names)
    ]


COLOURS = (
    "#0072b2",
    "#d55e00",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#444444",
    "#9aa7b5",
    "#7fcdb4",
    "#e5bcd3",
)


def panel(title: str, rows: list[tuple[Row, dict]], names: list[str]) -> str:
    """One chart: PSNR over ideal speed-up, a line a strategy; dashed: the worst picture; rings: the measured speed-up."""
    left, top, width, height, (slow, fast), (low, high) = 44, 34, 400, 300, (1.0, 4.0), (10, 80)

    def at(speed: float, decibels: float) -> tuple[float, float]:
        return left + width * (speed - slow) / (fast - slow), top + height * (
            high - min(max(decibels, low), high)
        ) / (high - low)

    pieces = [tag("text", escape(title), x=left, y=20, font_weight="bold")]
    for decibels in range(low, high + 1, 10):
        (x, y), (end, _) = at(slow, decibels), at(fast, decibels)
        pieces += [
            tag("line", x1=x, x2=end, y1=y, y2=y, stroke="#ddd"),
            tag("text", str(decibels), x=x - 6, y=y + 4, text_anchor="end"),
        ]
    for speed in (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0):
        (x, y), (_, end) = at(speed, low), at(speed, high)
        pieces += [
            tag("line", x1=x, x2=x, y1=y, y2=end, stroke="#ddd"),
            tag("text", f"{speed:g}", x=x, y=y + 16, text_anchor="middle"),
        ]
    for name, colour in zip(names, COLOURS):
        mine = [got for row, got in rows if kind(row) == name]
        found = sorted((got["speed-up"], got["PSNR"], got["worst PSNR"]) for got in mine)
        for column, dashes in ((1, "none"), (2, "4 3")):
            line = " ".join("{:.1f},{:.1f}".format(*at(values[0], values[column])) for values in found)
            pieces.append(
                tag(
                    "polyline",
                    points=line,
                    fill="none",
                    stroke=colour,
                    stroke_width=2 if column == 1 else 1,
                    stroke_dasharray=dashes,
                )
            )
        for speed, decibels, _ in found:
            x, y = at(speed, decibels)
            pieces.append(
                tag(
                    "circle",
                    tag("title", f"{escape(name)}: {speed:.2f}x, {decibels:.1f} dB"),
                    cx=x,
                    cy=y,
                    r=3.5,
                    fill=colour,
                )
            )
        for got in mine:
            if got.get("measured"):
                x, y = at(got["measured"], got["PSNR"])
                pieces.append(
                    tag(
                        "circle",
                        tag("title", f"{escape(name)}: {got['measured']:.2f}x measured"),
                        cx=x,
                        cy=y,
                        r=3.5,
                        fill="none",
                        stroke=colour,
                    )
                )
    return "".join(pieces)


def plot(measured: dict[tuple[str, int], list[tuple[Row, dict]]]) -> str:
    """PSNR over ideal speed-up as SVG, a panel for each family and number of steps, two in a row."""
    equal = ("condition", "serial, on one device")  # to serial: beyond the chart
    names = list(
        dict.fromkeys(kind(row) for rows in measured.values() for row, _ in rows if kind(row) not in equal)
    )
    across, down = min(2, len(measured)), -(-len(measured) // 2)
    pieces = [tag("rect", width="100%", height="100%", fill="white")]
    for number, ((family, steps), rows) in enumerate(measured.items()):
        place = f"translate({460 * (number % 2)} {380 * (number // 2)})"
        pieces.append(
            tag(
                "g",
                panel(f"demo-{family}, {steps} steps: PSNR to serial, dB, over ideal speed-up", rows, names),
                transform=place,
            )
        )
    columns, y = 3 if across == 2 else 1, 380 * down + 10
    for number, (name, colour) in enumerate(zip(names, COLOURS)):
        x, y = 50 + 300 * (number % columns), 380 * down + 10 + 22 * (number // columns)
        pieces += [tag("circle", cx=x, cy=y, r=4, fill=colour), tag("text", escape(name), x=x + 10, y=y + 4)]
    words = "Dashed: the worst picture. Rings: at the speed-up measured with the full-size networks."
    pieces.append(tag("text", words, x=50, y=y + 30, fill="#555"))
    size = {"viewBox": f"0 0 {460 * across} {y + 45}", "font_family": "sans-serif", "font_size": "12"}
    return tag("svg", "".join(pieces), xmlns="http://www.w3.org/2000/svg", **size)


def measured_speed(speeds: dict, family: str, row: Row) -> float | None:
    """A row's speed-up over the faster of serial and batched in what `benchmarks/speed.py` wrote, where that has it.

    Of condition partitioning with fewer steps: in proportion from all of them.
    """
    runs = {}
    for key, found in speeds["results"].items():
        name = key.split(" steps ")[-1]
        if key == f"{family} {SIZES[family]} {row.of} steps {name}" and "total" in found:
            runs[name] = found["total"]
    saved = {
        name: usual_reuse(row.of, PRESETS[name].share)
        for name in ("balanced", "fast")
        if speeds["conditions"][name] == PRESETS[name].words
    }
    preset = next((name for name, reuse in saved.items() if reuse == row.reuse), None)
    names = {"condition": "condition", "paper": f"paper-{row.rule.interval}", "step-extrapolation": preset}
    name = names.get(row.strategy) or f"{row.strategy}-{row.reuse.count}"
    if row.sampler or not {"serial", "batched", name} <= runs.keys():
        return None
    return min(runs["serial"], runs["batched"]) / (runs[name] * row.steps / row.of)


def main() -> None:
    parser = parser_of(__doc__.split("\n")[0])
    parser.set_defaults(prompts=64)
    parser.add_argument("--seeds", type=int, default=2, help="pictures of each prompt")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="an SVG")
    parser.add_argument("--speed", type=Path, metavar="FILE", help="what benchmarks/speed.py wrote")
    parser.set_defaults(steps=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    checkpoints = checkpoints_of(args)
    results = Results(args.json, conditions_of(args, checkpoints, seeds=args.seeds))
    print(in_words(results.conditions))
    speeds = json.loads(args.speed.read_text()) if args.speed else None
    print(
        "\nPSNR and SSIM are those against `serial` with all steps and the same sampler; an equal picture counts as 100 dB."
    )
    if speeds:
        print(
            f"Measured speed-ups: over the faster of serial and batched, with the full-size networks; of condition partitioning with fewer steps "
            f"in proportion from all of them; {in_words(speeds['conditions'])}."
        )
    for name, preset in PRESETS.items():
        print(f"Preset {name}: {preset.strategy}, {preset.words}.")
    measured, seeds = {}, [args.seed + n for n in range(args.seeds)]
    studios = {family: Studio(checkpoint, args.prompts, seeds) for family, checkpoint in checkpoints.items()}
    for steps in (args.steps,) if args.steps else STEPS:
        for family, studio in studios.items():
            rows = rows_of(family, steps)
            found = [(row, results.get(studio, row)) for row in rows]
            found = [
                (row, got | {"measured": measured_speed(speeds, family, row) if speeds else None})
                for row, got in found
            ]
            measured[family, steps] = found + on_one_device(found)
            lines = [
                [*line(row, got), f"{got['measured']:.2f}" if got["measured"] else ""]
                for row, got in measured[family, steps]
            ]
            sampler = next(iter(SAMPLERS[family_of(family).prediction]))
            print(
                f"\n## {family}, {steps} steps, {sampler}, guidance {studio.guidance:g}\n\n{table([*HEAD, 'measured speed-up'], lines)}",
                flush=True,
            )
    if args.plot:
        args.plot.write_text(plot(measured) + "\n")


if __name__ == "__main__":
    main()
