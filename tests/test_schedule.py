"""Schedules are data: every strategy's plans pass the check, and the check finds what is wrong."""

import random

import pytest

from hybridiff.schedule import Receive, Run, ScheduleError, Send, Step, StepPlan, check, prediction
from hybridiff.strategies import Settings, strategies
from hybridiff.switching import SwitchRule, find_switch


def random_case(rng: random.Random) -> tuple[list[float], Settings]:
    steps = rng.randint(1, 60)
    rule = SwitchRule(rng.randint(1, 20), rng.choice([0.0, 1e-4, 1e-2]), rng.randint(1, 70), rng.randint(0, 70))
    level, history = 0.3, []
    for _ in range(steps):
        level = max(1e-3, level + rng.uniform(-0.02, 0.015))
        history.append(level)
    return history, Settings(steps, rule)


def test_every_plan_is_sound():
    """Every send meets its receive in order, nobody waits for ever, every rank steps once; 400 seeded cases."""
    rng = random.Random(0)
    for _ in range(200):
        history, settings = random_case(rng)
        for family in ("sdxl", "sd3"):
            for strategy in strategies(family).values():
                kept = {}  # what each rank's store holds, over the steps
                for step in range(settings.steps):
                    plan = strategy.plan(step, history[:step], settings)
                    assert len(plan.operations) == strategy.ranks
                    check(plan)
                    assert_sources_exist(plan, kept)


def assert_sources_exist(plan: StepPlan, kept: dict[int, set]) -> None:
    """What an operation reads has been made or received before it, in this step or an earlier one."""
    for rank, operations in enumerate(plan.operations):
        store = kept.setdefault(rank, set())
        for operation in operations:
            if isinstance(operation, Run):
                assert operation.source is None or operation.source in store, f"rank {rank}: {operation}"
                made = {"whole": "prediction", "exit": "prediction"}.get(operation.part, operation.part)
                store |= {(made, text) for text in (("cond", "uncond") if operation.text == "both" else [operation.text])}
            elif isinstance(operation, Receive):
                store.add(operation.value)
            elif isinstance(operation, Send) and operation.value.what != "discrepancy":
                assert operation.value in store
            elif isinstance(operation, Step) and operation.along.what == "prediction":
                assert operation.along in store


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
