"""What the benchmarks share: the rows that they compare, the machine, tables."""

import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from hybridiff.presets import PRESETS, usual_reuse
from hybridiff.strategies import STRATEGIES, Settings, Strategy
from hybridiff.switching import SwitchRule
from models import family_of
from tests.full_size import SEED, on_meta

FAMILIES = ("sdxl", "sd3")
SHARES = {  # of the steps that may be saved, see presets.usual_reuse
    "step-extrapolation": (1 / 6, PRESETS["balanced"].share, PRESETS["fast"].share, 0.8),
    "inner-reuse": (1 / 3, 2 / 3),
    "guided-pipeline": (1 / 3, 2 / 3, 1),
}


def intervals(steps: int) -> list[int]:
    """k of the rows of the paper's strategy: 5, 10, 20, 30 of 50 steps (its Table 4), of others the same shares."""
    return list(dict.fromkeys(max(1, round(k * steps / 50)) for k in (5, 10, 20, 30)))


def with_interval(rule: SwitchRule, steps: int, k: int) -> SwitchRule:
    """The rule with k pipelined steps; its cap lies earlier where they would pass the last step."""
    return replace(rule, interval=k, cap=max(1, min(rule.cap, steps - k - 1)))


def row_plan(
    family: str, row: str, steps: int, ranks: int | None = None, tiny: bool = False
) -> tuple[Strategy, Settings]:
    """The strategy, on its usual number of ranks or another, and settings of a row: "serial", "batched", "condition", "paper-K", a preset of ours, or
    "step-extrapolation-N", "inner-reuse-N" or "guided-pipeline-N" with N saved steps.

    The switch comes by the cap, so that it does not depend on what the networks predict: the paper's cap, or earlier where
    the k + 1 pipelined steps would else pass the last step.
    """
    name, _, number = row.rpartition("-") if row[-1].isdigit() else (row, "", "5")
    if row in ("balanced", "fast"):
        name, settings = PRESETS[row].strategy, Settings(steps, reuse=usual_reuse(steps, PRESETS[row].share))
    elif name in SHARES:
        settings = Settings(steps, reuse=replace(usual_reuse(steps, 0.0), count=int(number)))
    else:
        settings = Settings(
            steps,
            with_interval(
                SwitchRule(window=steps + 1, slope=0.0, cap=family_of(family).switch["cap"]),
                steps,
                int(number),
            ),
        )
    return STRATEGIES[name].on(on_meta(family, tiny), ranks), settings


def machine() -> dict[str, object]:
    """Where and with what something was measured."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return {
        "processor": names[0] if names else platform.machine(), "cores": os.cpu_count(), "memory GB": round(memory, 1),
        "torch": torch.__version__, "python": platform.python_version(), "seed": SEED,
    }  # fmt: skip


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in markdown; floats with three digits after the point, None as nothing."""

    def cell(value: object) -> str:
        return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def in_words(conditions: dict[str, object]) -> str:
    """Conditions in one line."""
    return "; ".join(f"{name} {value}" for name, value in conditions.items())
