"""Random command lines: a whole picture or one sentence."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.hardship.fuzz_commands import draw, try_line


@settings(max_examples=20)
@given(rng=st.randoms(use_true_random=False))
def test_any_command_line_ends_well(rng: random.Random):
    """As in `benchmarks/hardship/fuzz_commands.py`."""
    assert not (result := try_line(draw(rng, False), False))["wrong"], result
