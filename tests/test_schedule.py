"""Schedules are data: every strategy's plans pass the check, and the check finds what is wrong."""

import random
from collections import Counter

import pytest

from hybridiff.schedule import (
    DISCREPANCY,
    GUIDED,
    Extrapolate,
    Guide,
    Join,
    Measure,
    Receive,
    Run,
    ScheduleError,
    Send,
    Step,
    StepPlan,
    Value,
    ahead,
    check,
    keys,
    prediction,
)
from hybridiff.strategies import Reuse, Settings, strategies
from hybridiff.switching import SwitchRule, find_switch
from tests.tiny import MMDIT, UNET


def random_case(rng: random.Random) -> tuple[list[float], Settings]:
    steps = rng.randint(1, 60)
    rule = SwitchRule(
        rng.randint(1, 20), rng.choice([0.0, 1e-4, 1e-2]), rng.randint(1, 70), rng.randint(0, 70)
    )
    level, history = 0.3, []
    for _ in range(steps):
        level = max(1e-3, level + rng.uniform(-0.02, 0.015))
        history.append(level)
    return history, Settings(steps, rule, Reuse(rng.randint(0, 30), rng.randint(0, 40), rng.randint(0, 5)))


def test_every_plan_is_sound():
    """Every send meets its receive in order, features sent are used, nobody waits for ever, every rank steps once; 400 seeded cases, some of
    them on 4, 6 and 8 ranks."""
    rng = random.Random(0)
    for case in range(200):
        history, settings = random_case(rng)
        for family, config in (("sdxl", UNET), ("sd3", MMDIT)):
            ranks = rng.choice((4, 6, 8))
            several = [
                strategy.on(ranks, config)
                for strategy in strategies(family).values()
                if strategy.many and case % 10 == 0
            ]
            for strategy in [*strategies(family).values(), *several]:
                kept, unread = (
                    {},
                    {},
                )  # rank -> value -> how many results of it that rank has had, has received and not used, over the steps
                for step in range(settings.steps):
                    plan = strategy.plan(step, history[:step], settings)
                    assert len(plan.operations) == strategy.ranks
                    check(plan)
                    assert_sources_exist(plan, kept)
                    assert_features_are_used(plan, unread)
                assert not any(unread.values()), f"{family} {strategy.ranks} {settings}: {unread}"


def assert_features_are_used(plan: StepPlan, unread: dict[int, Counter]) -> None:
    """No features are received in place of others that nobody has used."""
    for rank, operations in enumerate(plan.operations):
        waiting = unread.setdefault(rank, Counter())
        for operation in operations:
            match operation:
                case Receive(value) if value.what in ("entry", "inner"):
                    waiting[value] += 1
                case Run(source=value):
                    assert waiting.pop(value, 0) <= 1, f"rank {rank}: {operation}"
                case Extrapolate(value, made):
                    assert waiting.pop(value, 0) <= len(made), f"rank {rank}: {operation}"


def assert_sources_exist(plan: StepPlan, kept: dict[int, Counter]) -> None:
    """What an operation reads has been made or received before it, in this step or an earlier one, as often as it needs."""
    for rank, operations in enumerate(plan.operations):
        store = kept.setdefault(rank, Counter())
        for operation in operations:
            match operation:
                case Run(part, text, source, _, at, of, block):
                    assert source is None or store[source], f"rank {rank}: {operation}"
                    if part in ("keys", "attend", "end"):
                        assert store[Value("slice", text)], f"rank {rank}: {operation}"
                    if part == "attend":
                        assert all(store[keys(text, other, of, block)] for other in range(1, of + 1)), (
                            f"rank {rank}: {operation}"
                        )
                    if part in ("up", "exit"):
                        assert store[Value("skips", text, at=at if part == "up" else 0)], (
                            f"rank {rank}: {operation}"
                        )
                    if part in ("entry", "down"):
                        store[Value("skips", text, at=at)] += 1
                    store.update(
                        [prediction("cond"), prediction("uncond")] if text == "both" else [operation.leaves]
                    )
                case Join(text, of):
                    assert all(store[prediction(text, at, of)] for at in range(1, of + 1)), (
                        f"rank {rank}: {operation}"
                    )
                    store[prediction(text)] += 1
                case Receive(value):
                    store[value] += 1
                case Extrapolate(value, made):
                    assert store[value] >= len(made) and list(made) == sorted(set(made)), (
                        f"rank {rank}: {operation}"
                    )
                    store[ahead(value)] = 1
                case Guide(cond, uncond):
                    assert store[cond] and store[uncond], f"rank {rank}: {operation}"
                    store[GUIDED] += 1
                case Measure():
                    store[DISCREPANCY] += 1
                case Send(value) | Step(value):
                    assert store[value], f"rank {rank}: {operation}"
        for value in [value for value in store if value.ahead]:
            del store[value]  # good for this step only


def test_stages_follow_the_switch():
    """Warm-up, then k steps (by slope) or k + 1 (by the cap), then fully-connecting, cut at the last step."""
    rng = random.Random(1)
    for _ in range(200):
        history, settings = random_case(rng)
        plan = strategies("sdxl")["paper"].plan
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
