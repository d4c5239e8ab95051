"""Ranks against the one-process run: `equal` everywhere but for `batched`, which is `close`."""

import pytest
import torch

from hybridiff.strategies import Reuse
from hybridiff.switching import SwitchRule
from tests.tiny import make_task, run, run_on_ranks

EARLY = SwitchRule(window=3, slope=1.0, cap=6, interval=4)  # by slope, as soon as the curve falls
CAPPED = SwitchRule(window=50, cap=4, interval=3)
TAIL = SwitchRule(window=50, cap=8, interval=20)  # tau2 beyond the last step
SPARING = Reuse(start=3, count=5, end=2)
OURS = ("step-extrapolation", "inner-reuse", "guided-pipeline")
FAMILIES = ("sdxl", "sd3")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All two-rank runs of this file, from one pair of processes."""
    cases = [((f, "condition", 12, EARLY), {"sampler": s}) for f, s in (("sdxl", "ddim"), ("sdxl", "euler"), ("sd3", None))]
    cases.append((("sdxl", "condition", 3, EARLY), {"guidance": 0.5}))
    cases += [((f, "one-branch", 3, EARLY), {"guidance": 0.5}) for f in FAMILIES]
    cases += [((f, "paper", 12, rule), {}) for f in FAMILIES for rule in (EARLY, CAPPED, TAIL)]
    cases += [(("sdxl", "paper", 9, CAPPED), {"cut": cut}) for cut in (1, 3, 4, 6, 8)]
    cases += [(("sd3", "paper", 9, CAPPED), {"cut": (0, 1)}), (("sd3", "paper", 9, CAPPED), {"cut": (0, 3)})]
    cases += [((f, strategy, 12, SPARING), {}) for f in FAMILIES for strategy in OURS]
    return cases, run_on_ranks(tmp_path_factory.mktemp("ranks"), cases)


def test_condition_on_two_ranks_equals_serial(results):
    """`equal`: latents after every step, both ranks, both families, both samplers of the U-Net; also one branch without guidance."""
    for ((family, strategy, steps, rule), options), ranks in zip(*results):
        if strategy in ("condition", "one-branch"):
            serial = run(family, "serial", steps, rule, **options)
            for rank in ranks:
                assert torch.equal(rank["latents"], serial["latents"])
        if strategy == "condition":
            assert ranks[0]["discrepancies"] == serial["discrepancies"]


def test_two_ranks_equal_one_process(results):
    """`equal`: latents after every step on both ranks, stages, and bytes, against the schedule played by one process."""
    for (arguments, options), ranks in zip(*results):
        if arguments[1] not in ("condition", "one-branch"):
            played = run(*arguments, **options)
            assert "parallelism" in played["stages"]
            for rank in ranks:
                assert torch.equal(rank["latents"], played["latents"])
                assert rank["stages"] == played["stages"]
                assert rank["bytes"] == played["bytes"]


@pytest.mark.parametrize("family", FAMILIES)
def test_paper_before_the_switch_equals_serial(family):
    """`equal` up to the switch, different after it."""
    serial, paper = (run(family, strategy, 12, CAPPED)["latents"] for strategy in ("serial", "paper"))
    assert torch.equal(serial[:4], paper[:4])
    assert not torch.equal(serial[4], paper[4])


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_is_close_to_serial(family):
    """`close`: kernels may round differently at batch 2."""
    serial, batched = (run(family, strategy, 8, EARLY)["latents"] for strategy in ("serial", "batched"))
    assert (serial - batched).norm() / serial.norm() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_pipelined_steps_use_features_of_the_step_before(family):
    """A run written out by hand, without schedule or store: `equal` to `paper`."""
    steps, rule = 8, SwitchRule(window=50, cap=3, interval=2)  # filling step 3, pipelined steps 4 and 5
    played = run(family, "paper", steps, rule)["latents"]
    task = make_task(family, steps)
    net, cut, cond, uncond = task.denoiser, task.cut, task.conditioning["cond"], task.conditioning["uncond"]
    latents, previous = played[2], None
    with torch.inference_mode():
        for i in (3, 4, 5):
            t = task.sampler.timesteps[i : i + 1]
            entry_c, skips = net.entry(latents, t, cond, cut)
            entry_u, _ = net.entry(latents, t, uncond, cut)
            if i == 3:
                eps = net(latents, t, cond)
                made = net.inner(entry_u, t, uncond, cut)
            else:
                eps = net.exit(previous[1], skips, t, cond, cut)
                made = net.inner(previous[0] if family == "sdxl" else entry_u, t, uncond, cut)
            previous = (entry_c, made)
            latents = task.sampler.step(latents, eps, i)
            assert torch.equal(latents, played[i])


@pytest.mark.parametrize("strategy", OURS)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_reused_equals_serial(family, strategy):
    """`equal`: without reused steps, and in any case up to the first one."""
    serial, none, some = (
        run(family, name, 12, reuse)["latents"]
        for name, reuse in (("serial", SPARING), (strategy, Reuse(3, 0)), (strategy, SPARING))
    )
    assert torch.equal(serial, none)
    assert torch.equal(serial[:3], some[:3])
    assert not torch.equal(serial[3:], some[3:])


def by_hand(family: str, strategy: str, task, latents):
    """The guided predictions of steps 1 to 6 with steps 4 and 6 (in the pipeline, 3 to 6) saved; no schedule, no store."""
    net, cut, guided = task.denoiser, task.cut, {}
    line = lambda old, new, a, b, i: type(new)(*(y + (i - b) / (b - a) * (y - x) for x, y in zip(old, new)))  # noqa: E731
    h, predictions = {}, {}  # (text, step) -> inner features, prediction
    for i in range(1, 7):
        t, x = task.sampler.timesteps[i : i + 1], latents[i - 1]
        for text, told in task.conditioning.items():
            e, skips = net.entry(x, t, told, cut)
            h[text, i] = net.inner(e, t, told, cut)
            used = h[text, i]
            pipelined = strategy == "guided-pipeline" and i >= 3
            if pipelined:
                steps = [s for s in (1, 2, 3, 4, 5) if s < i and (s < 3 or (s % 2 == 1) == (text == "cond"))][-2:]
            elif strategy == "inner-reuse" and i in (4, 6):
                steps = {4: [2, 3], 6: [3, 5]}[i]
            if pipelined or (strategy == "inner-reuse" and i in (4, 6)):
                used = line(h[text, steps[0]], h[text, steps[1]], *steps, i)
            if not pipelined or (i % 2 == 1) == (text == "cond"):
                predictions[text, i] = net.exit(used, skips, t, told, cut)
            else:
                a, b = steps
                old, new = predictions[text, a], predictions[text, b]
                predictions[text, i] = new + (i - b) / (b - a) * (new - old)
        cond, uncond = predictions["cond", i], predictions["uncond", i]
        guided[i] = uncond + task.guidance * (cond - uncond)
        if strategy == "step-extrapolation" and i in (4, 6):
            a, b = {4: (2, 3), 6: (3, 5)}[i]
            guided[i] = guided[b] + (i - b) / (b - a) * (guided[b] - guided[a])
    return guided


@pytest.mark.parametrize("strategy", OURS)
@pytest.mark.parametrize("family", FAMILIES)
def test_our_formulas(family, strategy):
    """`close`: every guided step against the formulas written out by hand on the same latents."""
    reuse = Reuse(start=3, count=4, end=1) if strategy == "guided-pipeline" else Reuse(start=3, count=2, end=1)
    assert strategy == "guided-pipeline" or reuse.spread(8) == [4, 6]
    played = run(family, strategy, 8, reuse)["latents"]
    task = make_task(family, 8, nested=strategy != "step-extrapolation")
    with torch.inference_mode():
        guided = by_hand(family, strategy, task, played)
        for i in range(1, 7):
            expected = task.sampler.step(played[i - 1], guided[i], i)
            torch.testing.assert_close(played[i], expected, rtol=1e-5, atol=1e-5)
