"""tau1 and tau2 on curves worked out by hand."""

import torch

from hybridiff.guidance import discrepancy, guide
from hybridiff.switching import SwitchRule, average_fall, find_switch


def test_by_slope():
    """L = 3: from step 3 on, (M[i-2] - M[i]) / 3; the first in [0, 0.01) is at step 5."""
    history = [1.0, 0.8, 0.6, 0.4, 0.39, 0.38]
    assert [average_fall(history, i, 3) is None for i in range(6)] == [True] * 3 + [False] * 3
    assert abs(average_fall(history, 4, 3) - 0.07) < 1e-12
    switch = find_switch(history, SwitchRule(window=3, slope=0.01, cap=40, interval=5))
    assert (switch.tau1, switch.tau2, switch.first, switch.reason) == (5, 10, 6, "slope")


def test_a_fall_of_exactly_the_slope_does_not_fire():
    """L = 4, g = 1/8, all numbers dyadic, so that nothing rounds: (2 - 1.5) / 4 at step 4 is g, which [0, g) leaves out; a little less at step 5 fires.

    No fall at all is in [0, g).
    """
    rule = SwitchRule(window=4, slope=0.125, cap=40, interval=5)
    history = [4.0, 2.0, 1.75, 1.625, 1.5, 1.2578125]
    assert [average_fall(history, i, 4) for i in (4, 5)] == [0.125, 0.123046875]
    assert find_switch(history[:5], rule) is None
    assert find_switch(history, rule).tau1 == 5
    assert find_switch([4.0, 2.0, 1.75, 1.625, 2.0], rule).tau1 == 4


def test_a_rising_curve_does_not_fire():
    assert (
        find_switch([0.1 * i for i in range(20)], SwitchRule(window=3, slope=1.0, cap=40, interval=5)) is None
    )


def test_by_cap():
    """Decided at step cap - 1; the pipelined steps are cap..cap + k."""
    rule = SwitchRule(window=50, slope=1.0, cap=15, interval=5)
    assert find_switch([1.0] * 14, rule) is None
    switch = find_switch([1.0] * 15, rule)
    assert (switch.tau1, switch.tau2, switch.first, switch.reason) == (15, 20, 15, "cap")
    assert [switch.stage(i) for i in (14, 15, 20, 21)] == [
        "warm-up",
        "parallelism",
        "parallelism",
        "fully-connecting",
    ]


def test_slope_is_looked_at_before_the_cap():
    """Both true at step 14: the slope decides, tau1 = 14."""
    switch = find_switch([1.0] * 15, SwitchRule(window=14, slope=1.0, cap=15, interval=5))
    assert (switch.tau1, switch.reason) == (14, "slope")


def test_later_values_change_nothing():
    """What comes after the decision is never read: ranks that lack it agree."""
    rule = SwitchRule(window=3, slope=0.01, cap=4, interval=2)
    assert find_switch([1.0, 0.9, 0.8, 0.7, None, None], rule) == find_switch([1.0, 0.9, 0.8, 0.7], rule)


def test_guidance_and_discrepancy():
    cond, uncond = torch.tensor([3.0, -1.0]), torch.tensor([1.0, -3.0])
    assert torch.equal(guide(cond, uncond, 5.0), torch.tensor([11.0, 7.0]))
    assert torch.equal(guide(cond, uncond, 1.5), torch.tensor([4.0, 0.0]))
    assert all(torch.equal(guide(cond, uncond, scale), cond) for scale in (1.0, 0.5, 0.0, -2.0))
    assert discrepancy(cond, uncond).item() == 1.0  # mean 2 over mean 2
