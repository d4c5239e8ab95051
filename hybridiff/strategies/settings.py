"""What a strategy may depend on besides the step and the measurements."""

from dataclasses import dataclass

from hybridiff.switching import SwitchRule


@dataclass(frozen=True)
class Reuse:
    """Which steps save work by reusing what earlier ones computed: `count` steps between the first `start` and the last `end`."""

    start: int = 15
    count: int = 10
    end: int = 2

    def room(self, steps: int) -> int:
        """How many steps there are to choose from. Extrapolation needs two full steps before the first."""
        return max(0, steps - max(2, self.start) - self.end)

    def spread(self, steps: int) -> list[int]:
        """The chosen steps, evenly between the full ones."""
        room = self.room(steps)
        count = min(self.count, room)
        return [max(2, self.start) + (2 * j + 1) * room // (2 * count) for j in range(count)]

    def window(self, steps: int) -> range:
        """The chosen steps, one after the other."""
        first = max(2, self.start)
        return range(first, first + min(self.count, self.room(steps)))


@dataclass(frozen=True)
class Settings:
    """The number of steps, the rule of the paper's switch, and which steps the strategies of ours save."""

    steps: int
    rule: SwitchRule = SwitchRule()
    reuse: Reuse = Reuse()
