"""How the presets hold up beyond the defaults: `python benchmarks/presets.py --prompts 4 --json FILE`.

`balanced` and `fast` with 10 to 100 steps, guidance from 1.5 to 12, the family's first-order sampler and DPM++ 2M, on the demo checkpoints: PSNR
to `serial` with the same settings, beside condition partitioning with as many steps as each of them evaluates, which is ideally as fast.

`python benchmarks/presets.py --check --prompts 8` only looks, at 50 steps and the demos' guidance, with every first-order sampler, whether each picture
is above 40 dB and their mean above that of condition partitioning; exit status 1 if not.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import in_words, table  # noqa: E402
from benchmarks.quality.fidelity import Results, Row, Studio, checkpoints_of, conditions_of, parser_of  # noqa: E402
from hybridiff.presets import PRESETS, usual_reuse  # noqa: E402
from hybridiff.samplers import SAMPLERS  # noqa: E402
from models import family_of  # noqa: E402

STEPS = (10, 20, 28, 50, 100)
GUIDANCES = (1.5, 5.0, 12.0)
FLOOR = 40  # dB, of every picture at 50 steps with a first-order sampler
WORDS = "Steps saved: PSNR in dB (mean / worst), in brackets that of condition partitioning with as many steps as are evaluated. 0: nothing is saved."


def measured(results: Results, studio: Studio, name: str, sampler: str, steps: int) -> tuple[int, dict, dict]:
    """How many steps a preset saves with these settings, what it keeps, and what fewer steps keep."""
    reuse = usual_reuse(steps, PRESETS[name].share)
    where = f"guidance {studio.guidance:g}, {sampler}"
    ours = Row(
        f"{reuse.count} saved, {where}", PRESETS[name].strategy, steps, steps, reuse=reuse, sampler=sampler
    )
    ruler = Row(
        f"condition, {steps - reuse.count} steps, {where}",
        "condition",
        steps - reuse.count,
        steps,
        sampler=sampler,
    )
    return reuse.count, results.get(studio, ours), results.get(studio, ruler)


def cell(results: Results, studio: Studio, name: str, sampler: str, steps: int) -> str:
    """A preset and fewer steps, as the table has them."""
    if not usual_reuse(steps, PRESETS[name].share).count:
        return "0"
    count, ours, ruler = measured(results, studio, name, sampler, steps)
    return f"{count}: {ours['PSNR']:.1f} / {ours['worst PSNR']:.1f} ({ruler['PSNR']:.1f} / {ruler['worst PSNR']:.1f})"


def holds(results: Results, studio: Studio, name: str, sampler: str) -> bool:
    """Whether a preset keeps what it promises at 50 steps; prints the figures."""
    _, ours, ruler = measured(results, studio, name, sampler, 50)
    held = ours["worst PSNR"] > FLOOR and ours["PSNR"] > ruler["PSNR"]
    print(
        f"{studio.checkpoint.family}, {sampler}, {name}: mean {ours['PSNR']:.1f} dB ({ruler['PSNR']:.1f} by fewer steps), "
        f"worst {ours['worst PSNR']:.1f}: {'holds' if held else 'DOES NOT HOLD'}",
        flush=True,
    )
    return held


def main() -> int:
    parser = parser_of(__doc__.split("\n")[0])
    parser.set_defaults(prompts=4, steps=0)
    parser.add_argument("--check", action="store_true", help="only check what is promised at 50 steps")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    checkpoints = checkpoints_of(args)
    results = Results(args.json, conditions_of(args, checkpoints))
    if args.check:
        studios = [Studio(checkpoint, args.prompts, [args.seed]) for checkpoint in checkpoints.values()]
        held = [
            holds(results, studio, name, sampler)
            for studio in studios
            for sampler in SAMPLERS[studio.checkpoint.model.prediction]
            if sampler != "dpmpp_2m"
            for name in ("balanced", "fast")
        ]
        return 0 if all(held) else 1
    print(f"{in_words(results.conditions)}\n\n{WORDS}")
    for family, checkpoint in checkpoints.items():
        studio = Studio(checkpoint, args.prompts, [args.seed])
        for sampler in (next(iter(SAMPLERS[family_of(family).prediction])), "dpmpp_2m"):
            lines = []
            for steps in (args.steps,) if args.steps else STEPS:
                for guidance in GUIDANCES:
                    studio.guidance = guidance
                    lines.append(
                        [
                            steps,
                            f"{guidance:g}",
                            *(cell(results, studio, name, sampler, steps) for name in ("balanced", "fast")),
                        ]
                    )
            print(
                f"\n## {family}, {sampler}\n\n{table(('steps', 'guidance', 'balanced', 'fast'), lines)}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
