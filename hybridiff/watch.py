"""How the denoising loop tells the program around it what it does."""

from typing import Any

from hybridiff.schedule import Operation


class Watch:
    """What is told how the work goes. This one keeps nothing; `hybridiff.app.profile.Profile` keeps times and memory."""

    def begin(self) -> None:
        """The first step begins."""

    def mark(self) -> Any:
        """This moment."""

    def note(self, rank: int, step: int, operation: Operation, begun: Any) -> None:
        """An operation went on from `begun`, a mark, until now."""

    def phase(self, name: str) -> None:
        """A phase has ended: "text", "load", a step's stage, "decode"."""

    def bars(self) -> list:
        """What was kept of operations, as `hybridiff.cost.Bar`."""
        return []

    def memory(self) -> dict:
        """What was kept of memory."""
        return {}
