"""The schedule's cost and bytes, told beforehand."""

import random
from dataclasses import replace

import pytest
import torch

from benchmarks.full_size import make_task as make_full_task
from hybridiff.schedule import Run, Step, StepPlan, prediction
from hybridiff.strategies import Reuse, Settings, strategies
from hybridiff.switching import SwitchRule
from hybridiff.timeline import draw, explain, length, part_costs, plan_all, timeline, total_bytes
from tests.tiny import make_task, run

CAPPED = SwitchRule(window=50, cap=4, interval=3)
PAPER = {"sdxl": SwitchRule(window=50, cap=15, interval=5), "sd3": SwitchRule(window=50, cap=40, interval=5)}


@pytest.mark.parametrize("ranks", [2, 4, 6])
@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_bytes_told_are_the_bytes_sent(family, ranks):
    """`equal`, to the byte and by kind, where the switch comes by the cap."""
    task = make_task(family, 12)
    strategy = strategies(family)["paper"].on(ranks, task.denoiser.config)
    plans, task = plan_all(strategy, Settings(12, CAPPED)), replace(task, cuts=strategy.cuts(task.denoiser))
    assert total_bytes(plans, task) == run(family, "paper", 12, CAPPED, ranks=ranks)["bytes"]


def test_bytes_of_any_schedule():
    """`equal`, by kind: seeded random strategies, numbers of ranks and steps, rules and reuse, cuts and dual blocks; the switch where the run found it."""
    rng = random.Random(4)
    for _ in range(40):
        family, steps, dual = rng.choice(("sdxl", "sd3")), rng.randint(1, 14), rng.choice((0, 2))
        net = make_task(family, 1, dual=dual).denoiser
        name = rng.choice(
            [name for name in strategies(family) if name not in ("serial", "batched", "one-branch")]
        )
        strategy = strategies(family)[name].on(
            rng.choice(strategies(family)[name].counts(net.config)), net.config
        )
        rule = SwitchRule(
            rng.randint(1, 6), rng.choice((0.0, 1e-2, 1.0)), rng.randint(1, 12), rng.randint(0, 9)
        )
        told = rule if name == "paper" else Reuse(rng.randint(0, 6), rng.randint(0, 9), rng.randint(0, 3))
        cuts = strategy.cuts(net)
        if strategy.ranks == 2 and name == "paper":
            cuts = rng.choice([net.cuts((at,)) for at in range(1, net.config.segments)])
        played = run(family, name, steps, told, ranks=strategy.ranks, cuts=cuts, dual=dual)
        settings = Settings(steps, told) if name == "paper" else Settings(steps, reuse=told)
        plans = [strategy.plan(step, played["discrepancies"][:step], settings) for step in range(steps)]
        assert (
            total_bytes(plans, replace(make_task(family, steps, dual=dual), cuts=cuts)) == played["bytes"]
        ), f"{family} {name} {strategy.ranks} {settings} {cuts}"


def test_four_ranks_cost_what_the_arithmetic_says():
    """Worked by hand, 20 steps with one filling and five pipelined ones (k = 5, the cap), four equal segments, no rounding of slices."""
    settings = Settings(20, replace(CAPPED, interval=5))
    parts = {
        "whole": 1.0,
        "entry": 0.125,
        "down1": 0.125,
        "down2": 0.125,
        "inner2": 0.25,
        "up2": 0.125,
        "up1": 0.125,
        "exit": 0.125,
    }
    net = make_task("sdxl", 1).denoiser.config
    assert (
        abs(
            length(timeline(plan_all(strategies("sdxl")["paper"].on(4, net), settings), parts))
            - (14 + 1 + 5 * 0.25)
        )
        < 1e-9
    )
    parts = {
        "entry": 0.0,
        "inner": 0.25,
        "inner1": 0.25,
        "inner2": 0.25,
        "exit2": 0.25,
        "begin 1/2": 0,
        "begin 2/2": 0,
        "end 1/2": 0,
        "end 2/2": 0,
    }
    parts |= {
        f"{part} {at}/2 of block {block}": 0.5 / 6 / 2
        for part in ("keys", "attend")
        for at in (1, 2)
        for block in range(6)
    }
    net = make_task("sd3", 1).denoiser.config
    assert (
        abs(
            length(timeline(plan_all(strategies("sd3")["paper"].on(4, net), settings), parts))
            - (7 + 1 + 5 * 0.25)
        )
        < 1e-9
    )


@pytest.mark.parametrize("family, most", [("sdxl", 0.04e9), ("sd3", 0.12e9)])
def test_full_size_bytes_and_ideal_speed_up(family, most):
    """At 1024 x 1024, fp16, 50 steps, k = 5 few bytes travel; the ideal speed-up is that of the arithmetic."""
    task = make_full_task(family, 1024, 50, torch.float16)
    plans = plan_all(strategies(family)["paper"], Settings(50, PAPER[family]))
    assert 0 < total_bytes(plans, task).total() <= most
    costs = part_costs(task)
    if family == "sdxl":  # the released cut is 57/43 by floating-point operations
        assert abs(costs["inner"] - 0.57) < 0.02 or abs(costs["inner"] - 0.43) < 0.02
    assert 2.05 < 100 / length(timeline(plans, costs)) < 2.13


def test_baselines():
    for name, cost in (("serial", 20.0), ("batched", 20.0), ("condition", 10.0)):
        plans = plan_all(strategies("sdxl")[name], Settings(10))
        assert length(timeline(plans, {"whole": 1.0})) == cost


def test_a_receive_waits_for_its_send():
    """Worked by hand: in a pipelined step of 0.3 + 0.3 against 0.4, the rank with 0.4 waits for the prediction."""
    costs = {"whole": 1.0, "entry": 0.3, "inner": 0.4, "exit": 0.3}
    plans = plan_all(strategies("sdxl")["paper"], Settings(12, CAPPED))
    bars = timeline(plans, costs)
    waits = [bar for bar in bars if bar.what == "wait" and bar.step == 5 and bar.end > bar.start]
    assert [bar.rank for bar in waits] == [0] and abs(waits[0].end - waits[0].start - 0.2) < 1e-9
    assert abs(length(bars) - (4 + 1 + 3 * 0.6 + 4)) < 1e-9


def test_messages_take_their_time_one_after_the_other():
    """Worked by hand: a guided step of 1, then the exchange of 0.25; the discrepancy follows on the same lane with 0.5."""
    plans = plan_all(strategies("sdxl")["paper"], Settings(12, CAPPED))[:2]
    bars = timeline(plans[:1], {"whole": 1.0}, {"prediction": 0.25, "discrepancy": 0.5})
    assert length(bars) == 1.75
    assert [bar.end - bar.start for bar in bars if bar.what == "wait"] == [0.25, 0.25, 0.5]


def test_drawing():
    plan = StepPlan("warm-up", ((Run("whole", "cond"), Step(prediction("cond"))),))
    assert draw(timeline([plan, plan], {"whole": 1.0}), 1, columns_per_unit=4) == "  rank 0  ####|###"


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_explain_reads_well(family):
    task = make_task(family, 20)
    text = explain(
        "paper",
        strategies(family)["paper"],
        Settings(20, CAPPED),
        replace(task, denoiser=task.denoiser.to("meta")),
    )
    four = strategies(family)["paper"].on(4, task.denoiser.config)
    more = explain(
        "paper",
        four,
        Settings(20, CAPPED),
        replace(task, denoiser=task.denoiser.to("meta"), cuts=four.cuts(task.denoiser)),
    )
    assert (
        "idle outside of the middle stage: ranks 1, 3" if family == "sdxl" else "the same for blocks 1 to 5"
    ) in more
    assert max(map(len, more.splitlines())) < 160
    for piece in (
        "steps 0 to 3, warm-up",
        "step 4, parallelism",
        "fully-connecting",
        "speed-up",
        "bytes sent: ",
    ):
        assert piece in text
    assert max(map(len, text.splitlines())) < 160
