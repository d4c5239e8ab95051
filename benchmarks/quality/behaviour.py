"""What the method depends on, measured on the demo checkpoints: `python benchmarks/quality/behaviour.py --prompts 32 --plot FILE`.

By `serial`: the denoising discrepancy over the steps, where its minimum lies, which tau1 the paper's rule gives; how the
pictures change with fewer steps; what guidance from 1 to 12 does to how many prompts are followed.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from statistics import mean, median, quantiles

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks.common import in_words, table  # noqa: E402
from benchmarks.quality.fidelity import EQUAL, Row, Studio, checkpoints_of, conditions_of, parser_of  # noqa: E402
from hybridiff.app.report.page import psnr  # noqa: E402
from hybridiff.presets import paper_rule  # noqa: E402
from hybridiff.switching import find_switch  # noqa: E402
from models import family_of  # noqa: E402
from weights.demo.checker import compare, shares  # noqa: E402

FEWER = (35, 28, 20, 14, 10, 7, 5)
GUIDANCES = (1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 12.0)


def observe(studio: Studio, steps: int) -> dict:
    """All figures of one family."""
    family, jobs = studio.checkpoint.family, studio.jobs

    def make(count: int, guidance: float | None = None) -> tuple[list, list, float]:
        row = Row("serial", "serial", count, count)
        made = [studio.picture(row, studio.task(row, *job, guidance)) for job in jobs]
        seen = [
            compare(*studio.drawn[index], image.permute(2, 0, 1) / 127.5 - 1)
            for (index, _), (image, _) in zip(jobs, made)
        ]
        return [image for image, _ in made], [history for _, history in made], shares(seen)["everything"]

    reference, curves, right = make(steps)
    rule = paper_rule(family_of(family).switch, steps)
    switches = [find_switch(curve, rule) for curve in curves]
    fewer = {steps: (None, right)}
    for count in (count for count in FEWER if count < steps):
        images, _, share = make(count)
        fewer[count] = mean(psnr(a, b) or EQUAL for a, b in zip(images, reference)), share
    return {
        "discrepancy": [[curve[step] for curve in curves] for step in range(steps)],
        "minimum at": [min(range(steps), key=curve.__getitem__) for curve in curves],
        "tau1": [switch and switch.tau1 for switch in switches],
        "reason": Counter(switch.reason if switch else "never" for switch in switches),
        "steps": {count: {"PSNR": found, "right": share} for count, (found, share) in fewer.items()},
        "guidance": {scale: make(steps, scale)[2] for scale in GUIDANCES},
    }


def tell(found: dict, steps: int) -> str:
    """The figures in words and tables."""
    levels = [mean(values) for values in found["discrepancy"]]
    lowest = min(range(steps), key=levels.__getitem__)
    taus = [tau for tau in found["tau1"] if tau is not None]
    words = [
        f"Discrepancy, mean over the prompts: {levels[0]:.4f} at step 0, {levels[lowest]:.4f} at step {lowest} (lowest), {levels[-1]:.4f} at the last step.",
        f"Minimum of each prompt's own curve: median step {median(found['minimum at'])}, from {min(found['minimum at'])} to {max(found['minimum at'])}.",
        f"tau1 by the paper's rule: median {median(taus)}" if taus else "tau1 by the paper's rule: none",
        f"decided by {', '.join(f'{reason} {count}' for reason, count in found['reason'].items())}.",
    ]
    rows = [
        [count, "" if at["PSNR"] is None else f"{at['PSNR']:.1f}", f"{at['right']:.0%}"]
        for count, at in found["steps"].items()
    ]
    scales = [[f"{scale:g}", f"{share:.0%}"] for scale, share in found["guidance"].items()]
    return (
        "\n".join(words)
        + "\n\n"
        + table(["steps", f"PSNR to {steps} steps", "everything right"], rows)
        + "\n\n"
        + table(["guidance", "everything right"], scales)
    )


def plot(measured: dict[str, dict], path: Path) -> None:
    """A row of three panels a family."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(measured), 3, figsize=(13, 3.6 * len(measured)), squeeze=False)
    for (curve, fewer, guided), (family, found) in zip(panels, measured.items()):
        values = found["discrepancy"]
        low, high = zip(*((q[0], q[-1]) for q in (quantiles(at, n=10) for at in values)))
        curve.fill_between(range(len(values)), low, high, alpha=0.25, label="80% of the prompts")
        curve.plot([mean(at) for at in values], label="mean")
        curve.set(title=f"demo-{family}: denoising discrepancy", xlabel="step", ylim=(0, None))
        for tau, count in Counter(tau for tau in found["tau1"] if tau is not None).items():
            curve.axvline(tau, color="crimson", alpha=max(0.1, count / len(found["tau1"])), linewidth=1)
        curve.plot([], [], color="crimson", label="tau1 by the paper's rule")
        curve.legend(fontsize=8)
        counts = [count for count, at in found["steps"].items() if at["PSNR"] is not None]
        fewer.plot(counts, [found["steps"][count]["PSNR"] for count in counts], marker="o")
        fewer.set(title="fewer steps", xlabel="steps", ylabel=f"PSNR to {len(values)} steps, dB")
        guided.plot(
            list(found["guidance"]), [100 * share for share in found["guidance"].values()], marker="o"
        )
        guided.set(title="guidance", xlabel="scale", ylabel="prompts followed, %", ylim=(0, 105))
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = parser_of(__doc__.split("\n")[0])
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG or SVG (needs matplotlib)")
    args = parser.parse_args()
    if args.plot and args.prompts < 2:
        parser.error("--plot shows what 80% of the prompts do: give at least 2 --prompts.")
    torch.set_num_threads(args.threads)
    checkpoints = checkpoints_of(args)
    conditions = conditions_of(args, checkpoints, steps=args.steps)
    print(in_words(conditions))
    measured = {}
    for family, checkpoint in checkpoints.items():
        studio = Studio(checkpoint, args.prompts, [args.seed])
        measured[family] = observe(studio, args.steps)
        print(
            f"\n## {family}, guidance {studio.guidance:g}\n\n{tell(measured[family], args.steps)}", flush=True
        )
    if args.json:
        args.json.write_text(json.dumps({"conditions": conditions, "results": measured}, indent=1) + "\n")
    if args.plot:
        plot(measured, args.plot)


if __name__ == "__main__":
    main()
