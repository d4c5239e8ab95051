"""A rank that dies, at any phase."""

import random

import pytest

from benchmarks.deaths import Case, matrix, run_case

SAMPLE = random.Random(3).sample([case for case in matrix(2) if not case.torchrun and case.how != "wait"], 4)
INTERRUPTS = [
    Case("pipeline", "wait", 1, False),
    Case("load", "wait", 0, True),
    Case("start", "wait", 1, True),
]


@pytest.mark.parametrize(
    "case",
    [*SAMPLE, *INTERRUPTS],
    ids=lambda case: f"{case.place}, {case.how}, {case.victim}, {case.torchrun}",
)
def test_a_death_at_any_phase(case, tmp_path):
    """A seeded sample of `benchmarks/deaths.py`: the others end with a sentence each, nothing is left over; Ctrl-C ends all with one line."""
    result = run_case(
        case,
        tmp_path,
        2,
        "--preset paper --cap 4 --interval 3 --steps 12".split(),
        timeout=5,
        limit=60,
        interrupt=60,
    )
    assert not result["wrong"], result
