"""What the presets promise: the paper's numbers at any number of steps, and pictures near the exact ones."""

import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from PIL import Image

import train_free_sample
from hybridiff.presets import PRESETS, paper_rule, usual_reuse
from models import family_of
from weights.demo.scenes import sample

DEMOS = ("demo-sd3", "demo-sdxl")
PICTURES = 2  # of each demo; `benchmarks/presets.py --check` makes eight
FEWER = {"balanced": 38, "fast": 31}  # steps that each evaluates: `condition` with so many is ideally as fast
RUNS = {name: ("--preset", name) for name in ("exact", *FEWER)} | {
    f"as {name}": ("--preset", "exact", "--steps", str(steps)) for name, steps in FEWER.items()
}


@pytest.mark.parametrize("family, steps, window, slope, cap, interval", [
    ("sdxl", 28, 7, 7.142857142857143e-4, 8, 3), ("sdxl", 30, 7, 6.666666666666667e-4, 9, 3), ("sdxl", 100, 24, 2e-4, 30, 10),
    ("sd3", 28, 8, 1.7857142857142857e-4, 22, 3), ("sd3", 30, 9, 1.6666666666666667e-4, 24, 3), ("sd3", 100, 30, 5e-5, 80, 10),
    ("sdxl", 50, 12, 4e-4, 15, 5), ("sd3", 50, 15, 1e-4, 40, 5),
])  # fmt: skip
def test_the_papers_numbers_cover_the_same_stretch_at_any_number_of_steps(
    family, steps, window, slope, cap, interval
):
    """Window, cap and interval by steps / 50, rounded; a step falls by more where steps are few, so the slope by 50 / steps."""
    rule = paper_rule(family_of(family).switch, steps)
    assert (rule.window, rule.cap, rule.interval) == (window, cap, interval)
    assert rule.slope == pytest.approx(slope, rel=1e-12)


def make(demo: str, name: str, folder: Path) -> None:
    """Body of a process: the pictures of a demo by one run, through the command line."""
    files = ["--prompts", str(folder / "prompts.jsonl"), "--out", str(folder / demo / name)]
    sys.argv = ["train_free_sample.py", "--weights", demo, *RUNS[name], *files, "--quiet"]
    assert train_free_sample.main() == 0


def psnr(path: Path, reference: Path) -> float:
    """Peak signal-to-noise ratio of two pictures in dB."""
    one, other = (np.asarray(Image.open(each), dtype=np.float64) for each in (path, reference))
    return 10 * np.log10(255**2 / np.square(one - other).mean())


def test_the_presets_that_skip_stay_near_the_exact_picture_and_nearer_than_fewer_steps(tmp_path):
    """`close`, 50 steps, first-order samplers, the demos' guidance: each picture above 40 dB, their mean above that of `condition` as fast."""
    prompts = [{"prompt": sample("prompts of 9", index)[1], "seed": index} for index in range(PICTURES)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn) as pool:
        made = [pool.submit(make, demo, name, tmp_path) for demo in DEMOS for name in RUNS]
    for run in made:
        run.result()  # raises what the process raised
    for demo in DEMOS:
        distances = {
            name: [psnr(path, tmp_path / demo / "exact" / path.name) for path in sorted((tmp_path / demo / name).glob("*.png"))]
            for name in RUNS if name != "exact"
        }  # fmt: skip
        for name, steps in FEWER.items():
            assert 50 - usual_reuse(50, PRESETS[name].share).count == steps
            assert len(distances[name]) == PICTURES and min(distances[name]) > 40, (demo, name)
            assert mean(distances[name]) > mean(distances[f"as {name}"]), (demo, name)
