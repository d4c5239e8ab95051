"""How the presets hold up beyond the defaults: `python benchmarks/presets.py --prompts 4 --json FILE`.

`balanced` and `fast` with 10 to 100 steps, guidance from 1.5 to 12, the family's first-order sampler and DPM++ 2M, on the demo checkpoints: PSNR
to `serial` with the same settings, beside condition partitioning with as many steps as each of them evaluates, which is ideally as fast.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.fidelity import Results, Row, Studio, checkpoints_of, conditions_of, parser_of  # noqa: E402
from benchmarks.full_size import in_words, table  # noqa: E402
from hybridiff.presets import PRESETS, usual_reuse  # noqa: E402
from hybridiff.samplers import SAMPLERS  # noqa: E402

STEPS = (10, 20, 28, 50, 100)
GUIDANCES = (1.5, 5.0, 12.0)
WORDS = "Steps saved: PSNR in dB (mean / worst), in brackets that of condition partitioning with as many steps as are evaluated. 0: nothing is saved."


def cell(results: Results, studio: Studio, name: str, sampler: str, steps: int) -> str:
    """What a preset keeps with these settings, and what fewer steps keep."""
    reuse = usual_reuse(steps, PRESETS[name].share)
    if not reuse.count:
        return "0"
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
    ours, ruler = (results.get(studio, row) for row in (ours, ruler))
    return f"{reuse.count}: {ours['PSNR']:.1f} / {ours['worst PSNR']:.1f} ({ruler['PSNR']:.1f} / {ruler['worst PSNR']:.1f})"


def main() -> None:
    parser = parser_of(__doc__.split("\n")[0])
    parser.set_defaults(prompts=4, steps=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    checkpoints = checkpoints_of(args)
    results = Results(args.json, conditions_of(args, checkpoints))
    print(f"{in_words(results.conditions)}\n\n{WORDS}")
    for family, checkpoint in checkpoints.items():
        studio = Studio(checkpoint, args.prompts, [args.seed])
        for sampler in (next(iter(SAMPLERS[family])), "dpmpp_2m"):
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


if __name__ == "__main__":
    main()
