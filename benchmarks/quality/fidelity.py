"""What each strategy costs in fidelity, on the demo checkpoints: `python benchmarks/quality/fidelity.py --prompts 32 --json FILE`.

Makes a picture of every prompt with every row's settings, compares it with the picture by `serial` (PSNR and SSIM of the
8-bit images) and lets `weights/demo/checker.py` look whether it shows what was asked for, in everything and attribute by attribute. One process plays both ranks, which
gives the ranks' pictures bit for bit. Rows: one device, the paper's strategy with k = 5, 10, 20, 30, condition partitioning, and condition
partitioning with so many steps fewer that it is ideally as fast. With --json each row is written when it is there, and the command goes on from it.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks.common import in_words, intervals, machine, table, with_interval  # noqa: E402
from hybridiff.app.files import write_whole  # noqa: E402
from hybridiff.app.report.page import psnr  # noqa: E402
from hybridiff.cost import Costs, length, part_costs, timeline  # noqa: E402
from hybridiff.denoise import Task, denoise  # noqa: E402
from hybridiff.distributed.transport import LocalTransport  # noqa: E402
from hybridiff.pipeline import decode, draw_noise  # noqa: E402
from hybridiff.presets import paper_rule  # noqa: E402
from hybridiff.samplers import make_sampler  # noqa: E402
from hybridiff.strategies import STRATEGIES, Reuse, Settings, Strategy  # noqa: E402
from hybridiff.switching import SwitchRule  # noqa: E402
from hybridiff.text import encode  # noqa: E402
from models import family_of  # noqa: E402
from models.tape import Span  # noqa: E402
from weights.demo.checker import QUESTIONS, compare, percent, shares  # noqa: E402
from weights.demo.scenes import sample  # noqa: E402
from weights.load import Checkpoint, open_checkpoint  # noqa: E402

SIDE = 128  # pixels, where the checkpoint names no size
EQUAL = 100.0  # dB, what an equal picture counts as in a mean


@dataclass(frozen=True)
class Row:
    """A way to make the pictures. `of` is the number of steps that its speed-up and its reference are taken at."""

    name: str
    strategy: str
    steps: int
    of: int
    rule: SwitchRule = SwitchRule()
    reuse: Reuse = Reuse()
    sampler: str | None = None


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity of two (H, W, 3) uint8 images (Wang et al. 2004): Gaussian window of 11, sigma 1.5, mean over channels."""
    x, y = (image.permute(2, 0, 1).double()[:, None] / 255 for image in (a, b))  # (3, 1, H, W)
    line = torch.exp(-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2)).double()
    window = torch.outer(line, line)[None, None] / line.sum() ** 2
    mx, my = F.conv2d(x, window), F.conv2d(y, window)
    xx, yy, xy = (
        F.conv2d(x * x, window) - mx**2,
        F.conv2d(y * y, window) - my**2,
        F.conv2d(x * y, window) - mx * my,
    )
    c1, c2 = 0.01**2, 0.03**2
    return (((2 * mx * my + c1) * (2 * xy + c2)) / ((mx**2 + my**2 + c1) * (xx + yy + c2))).mean().item()


class Studio:
    """A checkpoint with everything that its pictures share: prompts (chosen by the first seed), their conditioning, the networks, the reference pictures."""

    def __init__(self, checkpoint: Checkpoint, prompts: int, seeds: list[int]):
        self.checkpoint = checkpoint
        self.guidance = checkpoint.defaults.get("guidance", checkpoint.model.guidance)
        self.drawn = [sample(f"prompts of {9 + seeds[0]}", index) for index in range(prompts)]
        self.jobs = [(index, seed) for seed in seeds for index in range(prompts)]
        self.height, self.width = (checkpoint.defaults.get(name, SIDE) for name in ("height", "width"))
        where = self.height, self.width, torch.device("cpu"), torch.float32
        self.told = [encode(checkpoint, caption, None, *where) for _, caption in self.drawn]
        self.denoiser = checkpoint.load("denoiser", torch.float32, torch.device("cpu"))
        self.references: dict[tuple, list[Tensor]] = {}  # by steps, sampler and guidance
        self.shares: dict[tuple[Span, ...], Costs] = {}  # spans of a strategy -> their shares

    def strategy(self, row: Row) -> Strategy:
        """The row's strategy on this network."""
        return STRATEGIES[row.strategy].on(self.denoiser)

    def task(self, row: Row, index: int, seed: int, guidance: float | None = None) -> Task:
        """What there is to do for one picture."""
        model, vae = self.checkpoint.model, self.checkpoint.config("vae")
        noise = draw_noise(model.latents((self.height, self.width), vae), 1000 * seed + index)
        sampler = make_sampler(
            model.prediction, row.sampler, row.steps, self.checkpoint.defaults.get("shift", 3.0)
        )
        return Task(self.denoiser, sampler, self.told[index], guidance or self.guidance, noise)

    def picture(self, row: Row, task: Task) -> tuple[Tensor, list[float | None]]:
        """The picture (H, W, 3) uint8, and the discrepancies measured on the way."""
        settings = Settings(row.steps, row.rule, row.reuse)
        records = list(denoise(task, self.strategy(row), settings, LocalTransport()))
        image = decode(self.checkpoint, records[-1].latents, torch.device("cpu"))
        return image, [record.discrepancy for record in records]

    def cost(self, row: Row, task: Task, history: list[float | None]) -> float:
        """Ideal cost of a picture in evaluations of the network, with the discrepancies that decided over its stages."""
        strategy, settings = self.strategy(row), Settings(row.steps, row.rule, row.reuse)
        plans = [strategy.plan(step, history[:step], settings) for step in range(row.steps)]
        return length(timeline(plans, self.costs(task, strategy)))

    def costs(self, task: Task, strategy: Strategy) -> Costs:
        """Shares of the network in the strategy's spans, counted once, on the meta device."""
        spans = strategy.partition.spans
        if spans not in self.shares:
            on_meta = replace(task, denoiser=self.checkpoint.part("denoiser").module)
            self.shares[spans] = part_costs(on_meta, strategy)
        return self.shares[spans]

    def reference(self, row: Row) -> list[Tensor]:
        """The pictures by `serial` with the row's sampler and its full number of steps."""
        key = (row.of, row.sampler, self.guidance)
        if key not in self.references:
            serial = Row("serial", "serial", row.of, row.of, sampler=row.sampler)
            self.references[key] = [self.picture(serial, self.task(serial, *job))[0] for job in self.jobs]
        return self.references[key]

    def measure(self, row: Row) -> dict[str, float]:
        """What the row's pictures are like: speed-up, PSNR (mean and worst), SSIM, shares of pictures right in everything and in each attribute."""
        references, made, costs, verdicts = self.reference(row), [], [], []
        for index, seed in self.jobs:
            task = self.task(row, index, seed)
            image, history = self.picture(row, task)
            made.append(image)
            costs.append(self.cost(row, task, history))
            verdicts.append(compare(*self.drawn[index], image.permute(2, 0, 1) / 127.5 - 1))
        ratios = [psnr(image, reference) or EQUAL for image, reference in zip(made, references)]
        likeness = [ssim(image, reference) for image, reference in zip(made, references)]
        attributes = shares(verdicts)
        right = attributes.pop("everything")
        return {
            "speed-up": 2 * row.of / mean(costs), "PSNR": mean(ratios), "worst PSNR": min(ratios), "SSIM": mean(likeness),
            "worst SSIM": min(likeness), "equal": sum(map(torch.equal, made, references)), "right": right, "attributes": attributes,
            "pictures": len(made),
        }  # fmt: skip


def paper_row(family: str, steps: int, k: int) -> Row:
    """The paper's strategy with k steps, by its own rule; its cap lies earlier where the k steps would pass the last one."""
    return Row(
        f"paper, k = {k}",
        "paper",
        steps,
        steps,
        with_interval(paper_rule(family_of(family).switch, steps), steps, k),
    )


def fewer(speed_up: float, steps: int) -> int:
    """The steps with which condition partitioning is ideally at least as fast as that, over `steps` steps of serial."""
    return max(1, int(steps / speed_up * 2 + 1e-9))


class Results:
    """Rows measured, in memory and in the file; conditions must agree with the file's."""

    def __init__(self, path: Path | None, conditions: dict):
        self.path, self.conditions, self.found = path, conditions, {}
        if path and path.exists():
            kept = json.loads(path.read_text())
            if kept["conditions"] != conditions:
                sys.exit(
                    f"{path} holds results of other conditions: give another --json, or the same options as then."
                )
            self.found = kept["rows"]

    def get(self, studio: Studio, row: Row) -> dict[str, float]:
        """The row's measurement, made now if it is not there."""
        key = f"{studio.checkpoint.family}, {row.of} steps, {row.name}"
        if key not in self.found:
            started = time.monotonic()
            self.found[key] = studio.measure(row)
            print(f"{key}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
            if self.path:
                text = json.dumps({"conditions": self.conditions, "rows": self.found}, indent=1) + "\n"
                write_whole(self.path, lambda temporary: temporary.write_text(text))
        return self.found[key]


HEAD = ("strategy", "steps", "ideal speed-up", "PSNR, dB", "worst", "SSIM", "equal", "everything right")


def line(row: Row, found: dict[str, float]) -> list[object]:
    """A row as the table has it."""
    return [row.name, row.steps, f"{found['speed-up']:.2f}", f"{found['PSNR']:.1f}", f"{found['worst PSNR']:.1f}", f"{found['SSIM']:.4f}",
            f"{found['equal']}/{found['pictures']}", f"{found['right']:.0%}"]  # fmt: skip


def parser_of(words: str) -> argparse.ArgumentParser:
    """The options that both benchmarks of fidelity have."""
    parser = argparse.ArgumentParser(
        description=words, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--family", nargs="+", choices=("sdxl", "sd3"), default=["sdxl", "sd3"])
    parser.add_argument(
        "--weights",
        help="another checkpoint than the demos, made for the same prompts; its family is the only one then",
    )
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0, help="chooses the prompts and the noise")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def checkpoints_of(args: argparse.Namespace) -> dict[str, Checkpoint]:
    """Family -> checkpoint: the demos of the families asked for, or the one that was given."""
    given = [
        open_checkpoint(name)
        for name in ([args.weights] if args.weights else [f"demo-{family}" for family in args.family])
    ]
    return {checkpoint.family: checkpoint for checkpoint in given}


def conditions_of(
    args: argparse.Namespace, checkpoints: dict[str, Checkpoint], **more: object
) -> dict[str, object]:
    """What the figures depend on."""
    digests = {family: checkpoint.digest()[:12] for family, checkpoint in checkpoints.items()}
    return (
        machine()
        | {"prompts": args.prompts, "seed": args.seed, "dtype": "float32", "weights": digests}
        | more
    )


def main() -> None:
    args = parser_of(__doc__.split("\n")[0]).parse_args()
    torch.set_num_threads(args.threads)
    checkpoints = checkpoints_of(args)
    results = Results(args.json, conditions_of(args, checkpoints, steps=args.steps))
    print(in_words(results.conditions))
    print(
        "\nPSNR and SSIM are those against `serial` with all steps; an equal picture counts as 100 dB. Speed-ups are ideal, over `serial`."
    )
    for family, checkpoint in checkpoints.items():
        studio = Studio(checkpoint, args.prompts, [args.seed])
        rows = [Row(name, name, args.steps, args.steps) for name in ("serial", "batched", "condition")]
        for k in intervals(args.steps):
            rows.append(paper_row(family, args.steps, k))
            steps = fewer(results.get(studio, rows[-1])["speed-up"], args.steps)
            rows.append(Row(f"condition, {steps} steps", "condition", steps, args.steps))
        found = [results.get(studio, row) for row in rows]
        lines = [
            [*line(row, got), *(percent(got["attributes"][name]) for name in QUESTIONS)]
            for row, got in zip(rows, found)
        ]
        print(
            f"\n## {family}, guidance {studio.guidance:g}\n\n{table([*HEAD, *QUESTIONS], lines)}", flush=True
        )


if __name__ == "__main__":
    main()
