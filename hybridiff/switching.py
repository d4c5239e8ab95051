"""When the stages change: tau1 and tau2 (paper, Eq. 2 and 3) as pure functions of a list of floats.

Steps count from 0, the noisiest. The exact bookkeeping is that of the released code, which differs by a step between its
two ways of switching: by slope the first pipelined step is tau1 + 1, by the cap it is tau1; the last one is tau2 in both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# the middle stage is called "parallelism" in the paper, and "skipping" in our strategies
Stage = Literal["warm-up", "parallelism", "skipping", "fully-connecting"]
MIDDLE: tuple[Stage, ...] = ("parallelism", "skipping")


@dataclass(frozen=True)
class SwitchRule:
    """The paper's four numbers; the defaults are those for SDXL (appendix G)."""

    window: int = 12  # L, at least 2: the slope is averaged over so many steps
    slope: float = 4e-4  # g: switch when the fall a step is in [0, g)
    cap: int = 15  # tau_cap, at least 1: switch here at the latest
    interval: int = 5  # k: tau2 = tau1 + k


@dataclass(frozen=True)
class Switch:
    """A decision taken: the pipelined steps are first..tau2, both included."""

    tau1: int
    tau2: int
    first: int
    reason: Literal["slope", "cap"]

    def stage(self, step: int) -> Stage:
        """The stage that a step belongs to."""
        if step < self.first:
            return "warm-up"
        return "parallelism" if step <= self.tau2 else "fully-connecting"


def average_fall(history: Sequence[float | None], step: int, window: int) -> float | None:
    """G (Eq. 2) at a step: (M[step - L + 1] - M[step]) / L, positive while M falls; None before step L, and where a value is None."""
    if step < window:
        return None
    before, now = history[step - window + 1], history[step]
    return None if before is None or now is None else (before - now) / window


def find_switch(history: Sequence[float | None], rule: SwitchRule) -> Switch | None:
    """The switch that the discrepancies of steps 0..len(history)-1 call for, or None while there is none.

    Values after the deciding step are never looked at (they may be None), so every rank that holds the same values up to it agrees.
    """
    for step in range(len(history)):
        fall = average_fall(history, step, rule.window)
        if fall is not None and 0 <= fall < rule.slope:
            return Switch(step, step + rule.interval, step + 1, "slope")
        if step >= rule.cap - 1:
            return Switch(rule.cap, rule.cap + rule.interval, rule.cap, "cap")
    return None
