"""Schedules are data: every strategy's plans pass the check, and the check finds what is wrong."""

from collections import Counter
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridiff.check import check
from hybridiff.schedule import (
    DISCREPANCY,
    GUIDED,
    Attend,
    Extrapolate,
    Guide,
    Join,
    Measure,
    Name,
    Project,
    Receive,
    Run,
    ScheduleError,
    Send,
    Step,
    StepPlan,
    extrapolated,
    features,
    keys,
    prediction,
)
from hybridiff.strategies import STRATEGIES, Reuse, Settings
from hybridiff.switching import SwitchRule, find_switch
from models.tape import Shard
from tests.tiny import make_task


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[float], Settings]:
    """Discrepancies that fall on the whole, and settings."""
    steps = draw(st.integers(1, 60))
    changes = draw(st.lists(st.floats(-0.02, 0.015), min_size=steps, max_size=steps))
    history = list(accumulate(changes, lambda level, change: max(1e-3, level + change), initial=0.3))[1:]
    slope = draw(st.sampled_from([0.0, 1e-4, 1e-2]))
    rule = SwitchRule(draw(st.integers(2, 20)), slope, draw(st.integers(1, 70)), draw(st.integers(0, 70)))
    reuse = Reuse(draw(st.integers(0, 30)), draw(st.integers(0, 40)), draw(st.integers(0, 5)))
    return history, Settings(steps, rule, reuse)


NETWORKS = {family: make_task(family, 1).denoiser for family in ("sdxl", "sd3")}
MANY = {"sdxl": (4, 6, 8), "sd3": (4, 6)}  # ranks


@settings(max_examples=120)
@given(case=cases(), family=st.sampled_from(["sdxl", "sd3"]), many=st.integers(0, 9), data=st.data())
def test_every_plan_is_sound(case: tuple[list[float], Settings], family: str, many: int, data: st.DataObject):
    """Every send meets its receive in order, features sent are used, nobody waits for ever, every rank steps once; some cases on 4, 6 and 8
    ranks."""
    (history, settings), net = case, NETWORKS[family]
    several = []
    if many == 9:
        ranks = data.draw(st.sampled_from(MANY[family]))
        several = [s.on(net, ranks) for s in STRATEGIES.values() if s.many]
    for strategy in [*(s.on(net) for s in STRATEGIES.values()), *several]:
        # rank -> name -> how many results of it that rank has had, has received and not used, over the steps
        store, unread, kept = {}, {}, {}
        for step in range(settings.steps):
            plan = strategy.plan(step, history[:step], settings)
            assert len(plan.operations) == strategy.ranks
            check(plan)
            assert_sources_exist(plan, store)
            assert_skips_exist(plan, kept, family, net.units)
            assert_features_are_used(plan, unread)
        assert not any(unread.values()), f"{family} {strategy.ranks} {settings}: {unread}"


def assert_features_are_used(plan: StepPlan, unread: dict[int, Counter]) -> None:
    """No features are received in place of others that nobody has used."""
    for rank, operations in enumerate(plan.operations):
        waiting = unread.setdefault(rank, Counter())
        for operation in operations:
            match operation:
                case Receive(name) if name.what == "features":
                    waiting[name] += 1
                case Run(source=name):
                    assert waiting.pop(name, 0) <= 1, f"rank {rank}: {operation}"
                case Extrapolate(name, steps):
                    assert waiting.pop(name, 0) <= len(steps), f"rank {rank}: {operation}"


def assert_skips_exist(plan: StepPlan, kept: dict[tuple, set], family: str, units: int) -> None:
    """A U-Net's way out runs on the rank that ran the way in, for the same branch, in the same step."""
    for rank, operations in enumerate(plan.operations):
        for run in operations:
            if isinstance(run, Run) and run.branch != "both" and family == "sdxl":
                skips = kept.setdefault((rank, run.branch), set())
                for unit in range(*run.span):
                    if unit < units // 2:
                        skips.add(unit)
                    elif unit > units // 2:
                        assert units - 1 - unit in skips, f"rank {rank}: {run}"
                        skips.remove(units - 1 - unit)


def assert_sources_exist(plan: StepPlan, stores: dict[int, Counter]) -> None:
    """What an operation reads has been made or received before it, in this step or an earlier one, as often as it needs."""
    for rank, operations in enumerate(plan.operations):
        store = stores.setdefault(rank, Counter())
        for operation in operations:
            where = f"rank {rank}: {operation}"
            match operation:
                case Run(_, branch, output, source):
                    assert source is None or store[source], where
                    both = prediction("cond"), prediction("uncond")
                    store.update(both if branch == "both" else [output])
                case Project(branch, unit, shard):
                    assert unit == 0 or store.pop(features(branch, unit, shard), 0), where
                    store.update([operation.output, Name("state", branch)])
                case Attend(branch, unit, shard, output):
                    assert store.pop(Name("state", branch), 0), where
                    every = [keys(branch, unit, Shard(index, shard.count)) for index in range(shard.count)]
                    assert all(store.pop(name, 0) for name in every), where
                    store[output] += 1
                case Join(branch, count):
                    rows = [prediction(branch, Shard(index, count)) for index in range(count)]
                    assert all(store.pop(name, 0) for name in rows), where
                    store[prediction(branch)] += 1
                case Receive(name):
                    store[name] += 1
                case Extrapolate(name, steps):
                    assert store[name] >= len(steps) and list(steps) == sorted(set(steps)), where
                    store[extrapolated(name)] = 1
                case Guide(cond, uncond):
                    assert store[cond] and store[uncond], where
                    store[GUIDED] += 1
                case Measure():
                    store[DISCREPANCY] += 1
                case Send(name) | Step(name):
                    assert store[name], where
        for name in [name for name in store if name.extrapolated]:
            del store[name]  # good for this step only


@settings(max_examples=150)
@given(case=cases())
def test_stages_follow_the_switch(case: tuple[list[float], Settings]):
    """Warm-up, then k steps (by slope) or k + 1 (by the cap), then fully-connecting, cut at the last step."""
    (history, settings), plan = case, STRATEGIES["paper"].on(NETWORKS["sdxl"]).plan
    stages = [plan(step, history[:step], settings).stage for step in range(settings.steps)]
    switch = find_switch(history, settings.rule)
    if switch is None:
        assert set(stages) == {"warm-up"}
    else:
        length = settings.rule.interval + (switch.reason == "cap")
        first = switch.tau1 + (switch.reason == "slope")
        expected = ["warm-up"] * first + ["parallelism"] * length + ["fully-connecting"] * settings.steps
        assert stages == expected[: settings.steps]


A, B = prediction("cond"), prediction("uncond")
WRONG = {
    "a send without its receive": ([Send(A, 1), Step(A)], [Step(A)]),
    "a receive without its send": ([Step(A)], [Receive(A, 0), Step(A)]),
    "a cycle of waits": ([Receive(A, 1), Send(B, 1), Step(A)], [Receive(B, 0), Send(A, 0), Step(A)]),
    "the wrong order": ([Send(A, 1), Send(B, 1), Step(A)], [Receive(B, 0), Receive(A, 0), Step(A)]),
    "a rank that does not step": ([Step(A)], []),
    "a message to itself": ([Send(A, 0), Step(A)], [Step(A)]),
    "a rank that is not there": ([Send(A, 2), Step(A)], [Step(A)]),
}


@pytest.mark.parametrize("what", WRONG)
def test_check_finds(what):
    with pytest.raises(ScheduleError):
        check(StepPlan("warm-up", tuple(tuple(operations) for operations in WRONG[what])))
