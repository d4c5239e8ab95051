"""What a strategy may depend on besides the step and the measurements."""

from dataclasses import dataclass
from typing import Sequence

from hybridiff.switching import Stage, SwitchRule


@dataclass(frozen=True)
class Reuse:
    """Which steps save work by going on from what earlier ones computed: `count` steps between the first `start` and the last `end`."""

    start: int = 15
    count: int = 10
    end: int = 2

    def choices(self, steps: int) -> range:
        """The steps to choose from. Extrapolation needs two full steps before the first."""
        return range(max(2, self.start), steps - self.end)

    def spread(self, steps: int) -> list[int]:
        """The chosen steps, evenly between the full ones; all where `count` is more than there are."""
        choices = self.choices(steps)
        count = min(self.count, len(choices))
        return [choices[(2 * j + 1) * len(choices) // (2 * count)] for j in range(count)]

    def consecutive(self, steps: int) -> range:
        """The chosen steps, one after the other; all where `count` is more than there are."""
        return self.choices(steps)[: self.count]


@dataclass(frozen=True)
class Settings:
    """The number of steps, the rule of the paper's switch, and which steps the strategies of ours save."""

    steps: int
    rule: SwitchRule = SwitchRule()
    reuse: Reuse = Reuse()


def stage_of(step: int, saved: Sequence[int]) -> Stage:
    """The middle stage reaches from the first to the last step that saves work."""
    if not saved or step < saved[0]:
        return "warm-up"
    return "parallelism" if step <= saved[-1] else "fully-connecting"


def last_full(step: int, saved: Sequence[int], count: int) -> tuple[int, ...]:
    """The last steps before this one that were computed in full, at most `count` of them."""
    return tuple(s for s in range(step) if s not in saved)[-count:]
