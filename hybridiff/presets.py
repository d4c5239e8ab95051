"""What a user picks: four names, each for a strategy and a share of the steps."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from hybridiff.strategies import Reuse
from hybridiff.switching import SwitchRule


class Preset(NamedTuple):
    """A strategy, and the share that it skips of the steps that may be skipped; see `usual_reuse`."""

    strategy: str
    share: float
    words: str


PRESETS = {
    "exact": Preset("condition", 0.0, "the picture of one device, bit for bit"),
    "balanced": Preset("step-extrapolation", 2 / 5, "12 of 50 steps skipped"),
    "fast": Preset("step-extrapolation", 19 / 30, "19 of 50 steps skipped"),
    "paper": Preset("paper", 0.0, "the three stages as published"),
}


def usual_reuse(steps: int, share: float, start: int | None = None) -> Reuse:
    """`share` of the steps that may be skipped: not the first `start`, in which the picture is laid out (by default 5 + steps / 5), nor the last
    tenth, at least two.

    With 50 steps 30 may be skipped. With fewer steps each one goes further, so less of the way can be extrapolated: the count is rounded down.
    """
    reuse = Reuse(start=5 + round(0.2 * steps) if start is None else start, end=max(2, round(0.1 * steps)))
    return replace(reuse, count=int(share * len(reuse.choices(steps))))


def paper_rule(switch: Mapping[str, Any], steps: int) -> SwitchRule:
    """The paper's numbers for a family (`models.family.Family.switch`), which are for 50 steps; with others the same stretch of the
    trajectory, so that a step falls by more."""
    rule, times = SwitchRule(**switch), steps / 50
    window, cap, interval = (
        max(least, round(times * number))
        for least, number in ((2, rule.window), (1, rule.cap), (1, rule.interval))
    )
    return replace(rule, window=window, slope=rule.slope / times, cap=cap, interval=interval)
