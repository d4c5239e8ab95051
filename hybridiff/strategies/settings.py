"""What a strategy may depend on besides the step and the measurements."""

from dataclasses import dataclass

from hybridiff.switching import SwitchRule


@dataclass(frozen=True)
class Settings:
    """The number of steps and the rule of the switch."""

    steps: int
    rule: SwitchRule = SwitchRule()
