"""Random command lines: a whole picture or one sentence."""

import random

from benchmarks.hardship.fuzz_commands import draw, try_line


def test_any_command_line_ends_well():
    """A seeded sample of `benchmarks/hardship/fuzz_commands.py`: a whole picture or one sentence."""
    rng = random.Random(11)
    for line in [draw(rng, False) for _ in range(12)]:
        assert not (result := try_line(line, False))["wrong"], result
