"""Ranks against the one-process run: `equal` everywhere but for `batched`, which is `close`."""

import pytest
import torch

from hybridiff.switching import SwitchRule
from tests.tiny import make_task, run, run_on_ranks

EARLY = SwitchRule(window=3, slope=1.0, cap=6, interval=4)  # by slope, as soon as the curve falls
CAPPED = SwitchRule(window=50, cap=4, interval=3)
TAIL = SwitchRule(window=50, cap=8, interval=20)  # tau2 beyond the last step
FAMILIES = ("sdxl", "sd3")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All two-rank runs of this file, from one pair of processes."""
    cases = [((f, "condition", 12, EARLY), {"sampler": s}) for f, s in (("sdxl", "ddim"), ("sdxl", "euler"), ("sd3", None))]
    cases.append((("sdxl", "condition", 3, EARLY), {"guidance": 0.5}))
    cases += [((f, "paper", 12, rule), {}) for f in FAMILIES for rule in (EARLY, CAPPED, TAIL)]
    cases += [(("sdxl", "paper", 9, CAPPED), {"cut": cut}) for cut in (1, 3, 4, 6, 8)]
    cases += [(("sd3", "paper", 9, CAPPED), {"cut": (0, 1)}), (("sd3", "paper", 9, CAPPED), {"cut": (0, 3)})]
    return cases, run_on_ranks(tmp_path_factory.mktemp("ranks"), cases)


def test_condition_on_two_ranks_equals_serial(results):
    """`equal`: latents after every step, both ranks, both families, both samplers of the U-Net."""
    for ((family, strategy, steps, rule), options), ranks in zip(*results):
        if strategy == "condition":
            serial = run(family, "serial", steps, rule, **options)
            for rank in ranks:
                assert torch.equal(rank["latents"], serial["latents"])
            assert ranks[0]["discrepancies"] == serial["discrepancies"]


def test_paper_on_two_ranks_equals_one_process(results):
    """`equal`: latents after every step on both ranks, stages, and bytes, against the schedule played by one process."""
    for (arguments, options), ranks in zip(*results):
        if arguments[1] == "paper":
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
