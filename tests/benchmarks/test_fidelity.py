"""The benchmarks of fidelity on the demo checkpoints, very few steps: what must be equal is, and what must differ does."""

import json
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import torch

from benchmarks.frontier import kind, measured_speed, on_one_device, plot, rows_of
from benchmarks.quality.fidelity import Row, Studio, fewer, ssim
from hybridiff.app.report.page import psnr
from hybridiff.presets import PRESETS, paper_rule, usual_reuse
from hybridiff.strategies import Reuse
from hybridiff.switching import SwitchRule
from models import FAMILIES
from weights.load import open_checkpoint


def test_ssim():
    """1 for equal images; by its formula for flat ones, where variances are 0; small for unlike noise."""
    grey = torch.full((32, 32, 3), 100, dtype=torch.uint8)
    noise = torch.randint(256, (2, 32, 32, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert ssim(noise[0], noise[0]) == pytest.approx(1)
    x, y = 100 / 255, 120 / 255
    assert ssim(grey, grey + 20) == pytest.approx((2 * x * y + 1e-4) / (x * x + y * y + 1e-4))
    assert ssim(noise[0], noise[1]) < 0.1


def test_rows():
    """`condition` equals serial picture by picture; saved steps change it and pay in speed as the arithmetic says."""
    studio = Studio(open_checkpoint("demo-sdxl"), prompts=1, seeds=[0])
    exact = studio.measure(Row("condition", "condition", 8, 8))
    assert (
        exact["equal"] == 1
        and exact["PSNR"] == 100
        and exact["SSIM"] == pytest.approx(1)
        and exact["speed-up"] == pytest.approx(2)
    )
    saved = studio.measure(Row("step-extrapolation", "step-extrapolation", 8, 8, reuse=Reuse(3, 2, end=2)))
    assert (
        saved["equal"] == 0
        and saved["worst PSNR"] <= saved["PSNR"] < 100
        and saved["speed-up"] == pytest.approx(16 / 6)
    )
    assert studio.measure(Row("fewer", "condition", 6, 8))["speed-up"] == pytest.approx(16 / 6)
    assert fewer(2.0, 50) == 50 and fewer(2.5, 50) == 40 and fewer(2.86, 50) == 34


def test_presets_scale_with_the_steps():
    """From 10 to 100 steps: saved steps apart from both ends, more of them in `fast`, fewer as a share where steps are few; the paper's numbers at 50."""
    saved = {
        name: [usual_reuse(steps, PRESETS[name].share) for steps in range(10, 101)]
        for name in ("balanced", "fast")
    }
    for name, reuses in saved.items():
        assert [reuse.count for reuse in reuses] == sorted(reuse.count for reuse in reuses)
        for steps, reuse in enumerate(reuses, 10):
            chosen = reuse.spread(steps)
            assert (
                len(set(chosen))
                == len(chosen)
                == reuse.count
                <= (0.27 if name == "balanced" else 0.42) * steps
            )
            assert all(7 <= reuse.start <= step < steps - 2 for step in chosen)
            assert not any({step, step + 1, step + 2} <= set(chosen) for step in chosen)
            if name == "balanced":
                assert (
                    not any(step + 1 in chosen for step in chosen)
                    and reuse.count <= saved["fast"][steps - 10].count
                )
    assert saved["balanced"][40].count == 12 and saved["fast"][40].count == 19
    assert usual_reuse(1, PRESETS["fast"].share).spread(1) == []
    assert usual_reuse(50, PRESETS["balanced"].share, start=30).count == 6  # of 30 .. 44
    for family in FAMILIES:
        assert paper_rule(family.switch, 50) == SwitchRule(**family.switch)
        assert all(
            paper_rule(family.switch, steps).cap + paper_rule(family.switch, steps).interval <= steps
            for steps in range(10, 101)
        )


@pytest.mark.parametrize("guidance, sampler", ((1.5, "ddim"), (12.0, "ddim"), (3.0, "dpmpp_2m")))
def test_presets_stay_close(guidance, sampler):
    """`close`: weak and strong guidance, samplers of both orders, 20 steps of the demo: the picture by `fast` is near that by `exact`."""
    studio = Studio(open_checkpoint("demo-sdxl"), prompts=1, seeds=[0])
    rows = [
        Row(name, PRESETS[name].strategy, 20, 20, reuse=usual_reuse(20, PRESETS[name].share), sampler=sampler)
        for name in ("exact", "fast")
    ]
    exact, fast = (studio.picture(row, studio.task(row, 0, 0, guidance))[0] for row in rows)
    assert psnr(exact, fast) > 25


def test_frontier_draws_every_curve():
    """Every row once, every curve in the SVG, which is well-formed; with --steps alone one panel a family."""
    measured = {
        (family, steps): [(row, {"speed-up": 2.5, "PSNR": 50.0, "worst PSNR": 40.0, "measured": 2.25}) for row in rows_of(family, steps)]
        for steps in (50, 28) for family in ("sdxl", "sd3")
    }  # fmt: skip
    for rows in measured.values():
        names = [row.name for row, _ in rows]
        assert len(set(names)) == len(names) and {row.strategy for row, _ in rows} == {
            "condition",
            "paper",
            "step-extrapolation",
            "inner-reuse",
            "guided-pipeline",
        }
        rows += on_one_device(rows)
    drawn = plot(measured)
    elements = list(ElementTree.fromstring(drawn).iter())
    said = [element.text or "" for element in elements]
    assert {kind(row) for rows in measured.values() for row, _ in rows} - set(said) == {
        "condition",
        "serial, on one device",
    }  # equal to serial
    drawn_rows = [row for rows in measured.values() for row, _ in rows if kind(row) in said]
    rings = [
        element for element in elements if element.get("fill") == "none" and element.tag.endswith("circle")
    ]
    assert len(rings) == len([row for row in drawn_rows if not row.name.endswith("device")])
    bottom = float(ElementTree.fromstring(drawn).get("viewBox").split()[3])
    assert all(float(element.get("y", 0)) < bottom for element in elements)


def test_measured_speeds_find_their_rows():
    """By hand, from made-up seconds: other sizes, steps, families and predictions, and presets that saved something else, are not taken."""
    seconds = {"sdxl 512 50 steps serial": 420.0, "sdxl 512 50 steps batched": 400.0, "sdxl 512 50 steps condition": 200.0, "sdxl 512 50 steps paper-5": 190.0,
               "sdxl 512 50 steps fast": 125.0, "sdxl 512 50 steps balanced": 100.0, "sdxl 512 50 steps inner-reuse-20": 160.0, "sdxl 256 50 steps batched": 1.0,
               "sdxl 512 28 steps serial": 1.0, "sd3 256 50 steps serial": 1.0}  # fmt: skip
    results = {key: {"total": value} for key, value in seconds.items()} | {
        "sdxl 512 50 steps PREDICTED for two CUDA devices": {},
        "sdxl 512 parts": {},
    }
    speeds = {"conditions": {"balanced": "otherwise", "fast": PRESETS["fast"].words}, "results": results}
    found = {row.name: measured_speed(speeds, "sdxl", row) for row in rows_of("sdxl", 50)}
    assert {name: speed for name, speed in found.items() if speed} == pytest.approx({
        "condition": 2.0, "condition, 45 steps": 2 / 0.9, "condition, 43 steps": 2 / 0.86, "condition, 38 steps": 2 / 0.76, "condition, 31 steps": 2 / 0.62,
        "condition, 26 steps": 2 / 0.52, "paper, k = 5": 400 / 190, "step-extrapolation, 19 saved": 3.2, "inner-reuse, 20 saved": 2.5,
    })  # fmt: skip
    assert not any(
        measured_speed(speeds, *at)
        for at in (("sdxl", rows_of("sdxl", 28)[0]), ("sd3", rows_of("sd3", 50)[0]))
    )


def test_presets_beyond_the_defaults(tmp_path):
    """The command with so few steps that both save the same one; a second run measures nothing again."""
    call = [
        sys.executable,
        "benchmarks/presets.py",
        "--family",
        "sdxl",
        "--prompts",
        "1",
        "--steps",
        "12",
        "--json",
        str(tmp_path / "p.json"),
    ]
    first, second = (subprocess.run(call, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == 0 and first.stdout == second.stdout and second.stderr == "", first.stderr
    rows = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert len(rows) == 2 * 2 * 3  # one saved and one fewer, two samplers, three guidances
    found = rows["sdxl, 12 steps, 1 saved, guidance 5, ddim"]
    assert f"| 12 | 5 | 1: {found['PSNR']:.1f} / {found['worst PSNR']:.1f} (" in first.stdout


def test_command_goes_on_from_its_file(tmp_path):
    """A second run measures nothing again and prints the same table; other conditions are refused."""
    call = [
        sys.executable,
        "benchmarks/quality/fidelity.py",
        "--family",
        "sd3",
        "--prompts",
        "1",
        "--steps",
        "4",
        "--json",
        str(tmp_path / "f.json"),
    ]
    first, second = (subprocess.run(call, capture_output=True, text=True) for _ in range(2))
    assert (
        first.returncode == 0
        and "serial" in first.stderr
        and second.stderr == ""
        and first.stdout == second.stdout
    )
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert rows["sd3, 4 steps, condition"]["equal"] == 1
    assert subprocess.run([*call, "--seed", "2"], capture_output=True).returncode != 0
