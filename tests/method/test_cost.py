"""The schedule's cost and bytes, told beforehand."""

import random
from dataclasses import replace

import pytest
import torch

from hybridiff.app.explain import draw, explain
from hybridiff.cost import length, part_costs, plan_all, timeline, total_bytes
from hybridiff.pipeline import Plan
from hybridiff.schedule import Attend, Project, Step, StepPlan, prediction
from hybridiff.strategies import STRATEGIES, Reuse, Settings, Strategy
from hybridiff.switching import SwitchRule
from models.tape import Shard
from tests.full_size import make_task as make_full_task
from tests.tiny import make_task, run, split_at

CAPPED = SwitchRule(window=50, cap=4, interval=3)
PAPER = {"sdxl": SwitchRule(window=50, cap=15, interval=5), "sd3": SwitchRule(window=50, cap=40, interval=5)}


@pytest.mark.parametrize("ranks", [2, 4, 6])
@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_bytes_told_are_the_bytes_sent(family, ranks):
    """`equal`, to the byte and by kind, where the switch comes by the cap."""
    task = make_task(family, 12)
    plans = plan_all(STRATEGIES["paper"].on(task.denoiser, ranks), Settings(12, CAPPED))
    assert total_bytes(plans, task) == run(family, "paper", 12, CAPPED, ranks=ranks)["bytes"]


def test_bytes_of_any_schedule():
    """`equal`, by kind: seeded random strategies, numbers of ranks and steps, rules and reuse, cuts and dual blocks; the switch where the run found it."""
    rng = random.Random(4)
    for _ in range(40):
        family, steps, dual = rng.choice(("sdxl", "sd3")), rng.randint(1, 14), rng.choice((0, 2))
        net = make_task(family, 1, dual=dual).denoiser
        name = rng.choice([name for name, strategy in STRATEGIES.items() if strategy.ranks > 1])
        ranks = rng.choice(STRATEGIES[name].counts(net))
        rule = SwitchRule(
            rng.randint(1, 6), rng.choice((0.0, 1e-2, 1.0)), rng.randint(1, 12), rng.randint(0, 9)
        )
        given = rule if name == "paper" else Reuse(rng.randint(0, 6), rng.randint(0, 9), rng.randint(0, 3))
        strategy, cut = STRATEGIES[name].on(net, ranks), None
        if ranks == 2 and name == "paper":
            cut = rng.randrange(1, net.most_ranks)
            strategy = split_at(strategy, cut)
        played = run(family, name, steps, given, ranks=ranks, cut=cut, dual=dual)
        settings = Settings(steps, given) if name == "paper" else Settings(steps, reuse=given)
        plans = [strategy.plan(step, played["discrepancies"][:step], settings) for step in range(steps)]
        described = f"{family} {name} {ranks} {settings} {cut}"
        assert total_bytes(plans, make_task(family, steps, dual=dual)) == played["bytes"], described


def test_four_ranks_cost_what_the_arithmetic_says():
    """Worked by hand, 20 steps with one filling and five pipelined ones (k = 5, the cap), four equal parts, no rounding of shards."""
    settings = Settings(20, replace(CAPPED, interval=5))
    for family, full_steps, share in (("sdxl", 14, 1.0), ("sd3", 7, 0.5)):
        strategy = STRATEGIES["paper"].on(make_task(family, 1).denoiser, 4)
        units, spans, owners = strategy.partition.units, strategy.partition.spans, strategy.partition.owners
        costs = {span: 0.25 / owners.count(owner) for span, owner in zip(spans, owners)} | {(0, units): 1.0}
        halves = [
            (half, unit, Shard(i, 2)) for half in (Project, Attend) for unit in range(units) for i in (0, 1)
        ]
        costs |= dict.fromkeys(halves, share / units / 2)
        assert length(timeline(plan_all(strategy, settings), costs)) == pytest.approx(
            full_steps + 1 + 5 * 0.25
        )


@pytest.mark.parametrize("family, most", [("sdxl", 0.04e9), ("sd3", 0.12e9)])
def test_full_size_bytes_and_ideal_speed_up(family, most):
    """At 1024 x 1024, fp16, 50 steps, k = 5 few bytes travel; the ideal speed-up is that of the arithmetic."""
    task = make_full_task(family, 1024, 50, torch.float16)
    strategy = STRATEGIES["paper"].on(task.denoiser)
    plans = plan_all(strategy, Settings(50, PAPER[family]))
    assert 0 < total_bytes(plans, task).total() <= most
    costs = part_costs(task, strategy)
    if family == "sdxl":  # the released cut is 57/43 by floating-point operations
        assert abs(costs[7, 12] - 0.57) < 0.02 or abs(costs[7, 12] - 0.43) < 0.02
    assert 2.05 < 100 / length(timeline(plans, costs)) < 2.13


WHOLE, SPANS = (0, 19), ((0, 7), (7, 12), (12, 19))  # of the tiny U-Net


def sdxl(name: str) -> Strategy:
    return STRATEGIES[name].on(make_task("sdxl", 1).denoiser)


def test_baselines():
    for name, cost in (("serial", 20.0), ("batched", 20.0), ("condition", 10.0)):
        assert length(timeline(plan_all(sdxl(name), Settings(10)), {WHOLE: 1.0})) == cost


def test_a_receive_waits_for_its_send():
    """Worked by hand: in a pipelined step of 0.3 + 0.3 against 0.4, the rank with 0.4 waits for the prediction."""
    costs = {WHOLE: 1.0} | dict(zip(SPANS, (0.3, 0.4, 0.3)))
    bars = timeline(plan_all(sdxl("paper"), Settings(12, CAPPED)), costs)
    waits = [bar for bar in bars if bar.what == "wait" and bar.step == 5 and bar.end > bar.start]
    assert [bar.rank for bar in waits] == [0] and abs(waits[0].end - waits[0].start - 0.2) < 1e-9
    assert abs(length(bars) - (4 + 1 + 3 * 0.6 + 4)) < 1e-9


def test_messages_take_their_time_one_after_the_other():
    """Worked by hand: a guided step of 1, then the exchange of 0.25; the discrepancy follows on the same channel with 0.5."""
    plans, delays = (
        plan_all(sdxl("paper"), Settings(12, CAPPED))[:1],
        {"prediction": 0.25, "discrepancy": 0.5},
    )
    bars = timeline(plans, {WHOLE: 1.0}, lambda name: delays[name.what])
    assert length(bars) == 1.75
    assert [bar.end - bar.start for bar in bars if bar.what == "wait"] == [0.25, 0.25, 0.5]


def test_drawing():
    run_it = sdxl("serial").partition.whole("cond")
    plan = StepPlan("warm-up", ((run_it, Step(prediction("cond"))),))
    assert draw(timeline([plan, plan], {WHOLE: 1.0}), 1, columns_per_unit=4) == "  rank 0  ####|###"


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_explain_reads_well(family):
    task = make_task(family, 20)
    on_meta = replace(task, denoiser=task.denoiser.to("meta"))
    text, more = (
        explain(
            "paper",
            Plan(None, STRATEGIES["paper"].on(task.denoiser, ranks), task.sampler, Settings(20, CAPPED)),
            on_meta,
        )
        for ranks in (2, 4)
    )
    for piece in {
        "sdxl": ["idle outside of the middle stage: ranks 1, 3"],
        "sd3": ["the same for units 1 to 5"],
    }[family]:
        assert piece in more
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
