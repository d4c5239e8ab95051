"""What a strategy may depend on besides the step, the measurements and the partition."""

from collections.abc import Sequence
from dataclasses import dataclass

from hybridiff.switching import Stage, SwitchRule


@dataclass(frozen=True)
class Reuse:
    """Which steps are skipped, wholly or in part: `count` of those between the first `start` and the last `end`. The default is `balanced` at 50 steps."""

    start: int = 15
    count: int = 12
    end: int = 5

    def choices(self, steps: int) -> range:
        """The steps to choose from. Extrapolation needs two full steps before the first."""
        return range(max(2, self.start), steps - self.end)

    def spread(self, steps: int) -> list[int]:
        """The skipped steps, evenly between the full ones; all where `count` is more than there are."""
        choices = self.choices(steps)
        count = min(self.count, len(choices))
        return [choices[(2 * j + 1) * len(choices) // (2 * count)] for j in range(count)]

    def consecutive(self, steps: int) -> range:
        """The skipped steps, one after the other; all where `count` is more than there are."""
        return self.choices(steps)[: self.count]


@dataclass(frozen=True)
class Settings:
    """The number of steps, the rule of the paper's switch, and which steps our strategies skip."""

    steps: int
    rule: SwitchRule = SwitchRule()
    reuse: Reuse = Reuse()


def stage_of(step: int, skipped: Sequence[int]) -> Stage:
    """The middle stage reaches from the first to the last skipped step."""
    if not skipped or step < skipped[0]:
        return "warm-up"
    return "skipping" if step <= skipped[-1] else "fully-connecting"


def last_full(step: int, skipped: Sequence[int], count: int) -> tuple[int, ...]:
    """The last steps before this one that were computed in full, at most `count` of them."""
    return tuple(s for s in range(step) if s not in skipped)[-count:]
