"""`exact` gives the same pixels on one process, on two ranks and again; ranks of unlike arithmetic agree on every stage."""

import random
from dataclasses import replace

import pytest

from benchmarks.quality.same_pictures import draw, in_one_process, on_two_ranks
from hybridiff.switching import SwitchRule


def test_exact_is_the_same_picture_everywhere():
    """`equal` PNG pixels; a seeded sample of `benchmarks/quality/same_pictures.py`."""
    rng = random.Random(7)
    requests = [draw(rng) for _ in range(4)]
    ranks, one, again = on_two_ranks(requests)[0], in_one_process(requests), in_one_process(requests)
    assert (
        [told["pixels"] for told in ranks]
        == [told["pixels"] for told in one]
        == [told["pixels"] for told in again]
    )


@pytest.mark.parametrize("unlike", ["threads", "bf16"])
def test_ranks_of_unlike_arithmetic_agree_on_the_stages(unlike):
    """The switch is decided by the slope, on numbers that would differ if each rank measured for itself."""
    rule = SwitchRule(window=2, slope=0.05, cap=6, interval=2)
    requests = [
        (family, replace(request, steps=9, height=16, width=16, rule=rule))
        for family, request in (draw(random.Random(n), "paper") for n in range(2))
    ]
    first, second = on_two_ranks(requests, unlike)
    for a, b in zip(first, second):
        assert a["stages"] == b["stages"] and "parallelism" in a["stages"]
        decided = a["stages"].index("parallelism")  # afterwards rank 0 measures for the report alone
        assert a["discrepancies"][:decided] == b["discrepancies"][:decided]
    if unlike == "bf16":  # the arithmetic did differ
        assert [told["pixels"] for told in first] != [told["pixels"] for told in in_one_process(requests)]
