"""TorchTransport against the one-process run: `equal` everywhere but for `batched`, which is `close`."""

import pytest
import torch

from hybridiff.denoise import Worker
from hybridiff.distributed.transport import LocalTransport
from hybridiff.schedule import GUIDED
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
    cases = [
        ((f, "condition", 12, EARLY), {"sampler": s})
        for f, s in (("sdxl", "ddim"), ("sdxl", "euler"), ("sd3", None))
    ]
    cases.append((("sdxl", "condition", 3, EARLY), {"guidance": 0.5}))
    cases += [((f, "one-branch", 3, EARLY), {"guidance": 0.5}) for f in FAMILIES]
    cases += [((f, "paper", 12, rule), {}) for f in FAMILIES for rule in (EARLY, CAPPED, TAIL)]
    cases += [(("sdxl", "paper", 9, CAPPED), {"cut": cut}) for cut in (1, 3, 4, 6, 8)]
    cases += [(("sd3", "paper", 9, CAPPED), {"cut": cut}) for cut in (1, 3)]
    cases += [((f, strategy, 12, SPARING), {}) for f in FAMILIES for strategy in OURS]
    return cases, run_on_ranks(tmp_path_factory.mktemp("ranks"), cases)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """All four-rank runs of this file, from one set of processes."""
    cases = [
        ((f, "paper", 10, rule), {"ranks": 4})
        for f, rule in (("sdxl", EARLY), ("sdxl", TAIL), ("sd3", CAPPED), ("sd3", TAIL))
    ]
    cases += [((f, "step-extrapolation", 8, SPARING), {"ranks": 4}) for f in FAMILIES]
    cases += [(("sd3", "condition", 3, SPARING), {"ranks": 4, "dual": 2})]
    return cases, run_on_ranks(tmp_path_factory.mktemp("four"), cases, ranks=4)


def test_four_ranks_equal_one_process(four):
    """`equal`: latents after every step on all ranks, stages, discrepancies and bytes, against the schedule played by one process."""
    for (arguments, options), ranks in zip(*four):
        played = run(*arguments, **options)
        for rank in ranks:
            assert torch.equal(rank["latents"], played["latents"])
            assert rank["stages"] == played["stages"] and rank["bytes"] == played["bytes"]
        assert ranks[0]["discrepancies"] == played["discrepancies"]


@pytest.mark.parametrize("family, ranks", [("sdxl", 4), ("sdxl", 8), ("sd3", 4), ("sd3", 6)])
def test_a_branch_on_several_ranks_is_close_to_serial(family, ranks):
    """The MMDiT's slices of the sequence: `close`, for products with fewer rows may round differently. The U-Net, whose spare ranks idle: `equal`."""
    for options in [{}, {"dual": 2}] if family == "sd3" else [{}]:
        serial, shared = (
            run(family, name, 5, EARLY, ranks=n, **options)["latents"]
            for name, n in (("serial", 1), ("condition", ranks))
        )
        assert (serial - shared).norm() / serial.norm() < 1e-5
        assert torch.equal(serial, shared) or family == "sd3"


@pytest.mark.parametrize("family", FAMILIES)
def test_spans_use_features_of_the_step_before(family):
    """Four ranks, written out by hand without schedule or store: `equal` to `paper` on four ranks."""
    steps, rule = 12, SwitchRule(window=50, cap=3, interval=7)  # filling step 3, pipelined steps 4 to 10
    played = run(family, "paper", steps, rule, ranks=4)["latents"]
    task = make_task(family, steps)
    net, size = task.denoiser, task.noise.shape[2:]
    spans = net.split(4).spans
    given = [task.conditioning[branch] for branch in ("uncond", "uncond", "cond", "cond")]  # of each rank
    latents, old = played[2], None
    with torch.inference_mode():
        for i in range(3, 11):
            t = task.sampler.timesteps[i : i + 1]

            def ran(j, x, rank, kept, t=t):
                return net.run(spans[j], x, kept, t, given[rank], size)

            if i == 3:
                prediction, crossed = net(latents, t, given[3]), {}
                for rank in (0, 3):
                    x, kept, crossed[rank] = latents, {}, []
                    for j in range(len(spans)):
                        x = ran(j, x, rank, kept)
                        crossed[rank].append(x)
            if family == "sd3":  # what each rank hands to the next
                if i == 3:
                    made = [crossed[0][0], crossed[0][1], crossed[3][2]]
                else:
                    prediction = ran(3, old[2], 3, {})
                    made = [ran(rank, [latents, *old][rank], rank, {}) for rank in range(3)]
            elif (
                i == 3
            ):  # what crosses the three cuts inwards, then outwards, for the branch of the span's owner
                made = [*crossed[3][:2], *crossed[0][2:5], crossed[3][5]]
            else:
                kept = [{}, {}, {}, {}]
                made = [ran(0, latents, 3, kept[3]), ran(1, old[0], 2, kept[2]), ran(2, old[1], 1, kept[1])]
                made += [ran(3, old[2], 0, kept[0]), ran(4, old[3], 1, kept[1]), ran(5, old[4], 2, kept[2])]
                prediction = ran(6, old[5], 3, kept[3])
            latents, old = task.sampler.step(latents, prediction, i), made
            assert torch.equal(latents, played[i]), i


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
            assert {"parallelism", "skipping"} & set(played["stages"])
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
    net, size = task.denoiser, task.noise.shape[2:]
    spans, cond, uncond = net.split(2).spans, task.conditioning["cond"], task.conditioning["uncond"]
    latents, old = played[2], None
    with torch.inference_mode():
        for i in (3, 4, 5):
            t, kept = task.sampler.timesteps[i : i + 1], {}
            first = net.run(spans[0], latents, kept, t, cond if family == "sdxl" else uncond, size)
            if i == 3:
                prediction = net(latents, t, cond)
                both = net.run(spans[0], latents, {}, t, uncond, size)
                inner = net.run(spans[1], both, {}, t, uncond, size)
            elif family == "sdxl":
                prediction = net.run(spans[2], old[1], kept, t, cond, size)
                inner = net.run(spans[1], old[0], {}, t, uncond, size)
            else:
                prediction, inner = net.run(spans[1], old[0], {}, t, cond, size), None
            latents, old = task.sampler.step(latents, prediction, i), (first, inner)
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


@pytest.mark.parametrize("strategy, skipping", [
    ("step-extrapolation", [4, 5, 6]),  # 4 and 6 are skipped
    ("inner-reuse", [4, 5, 6]),  # 4 and 6 are skipped in part
    ("guided-pipeline", [3, 4]),  # both are
])  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
def test_the_middle_stage_ends_with_the_last_skipped_step(family, strategy, skipping):
    """9 steps, two of 3 .. 6 skipped: `skipping` from the first skipped step to the last one, both included."""
    stages = run(family, strategy, 9, Reuse(start=3, count=2, end=2))["stages"]
    first, last = skipping[0], skipping[-1]
    expected = ["warm-up"] * first + ["skipping"] * len(skipping) + ["fully-connecting"] * (8 - last)
    assert stages == expected


def by_hand(family: str, strategy: str, task, latents):
    """The guided predictions of steps 1 to 6 with steps 4 and 6 (in the pipeline, 3 to 6) skipped; no schedule, no store."""
    net, size, guided = task.denoiser, task.noise.shape[2:], {}
    first, middle, end = net.split(2, nested=True).spans

    def line(old, new, a, b, i):
        if isinstance(new, torch.Tensor):
            return new + (i - b) / (b - a) * (new - old)
        return tuple(y + (i - b) / (b - a) * (y - x) for x, y in zip(old, new))

    h, predictions = {}, {}  # (branch, step) -> inner features, prediction
    for i in range(1, 7):
        t, x = task.sampler.timesteps[i : i + 1], latents[i - 1]
        for branch, given in task.conditioning.items():
            kept = {}
            e = net.run(first, x, kept, t, given, size)
            h[branch, i] = used = net.run(middle, e, {}, t, given, size)
            pipelined = strategy == "guided-pipeline" and i >= 3
            if pipelined:
                steps = [
                    s for s in (1, 2, 3, 4, 5) if s < i and (s < 3 or (s % 2 == 1) == (branch == "cond"))
                ]
                steps = steps[-2:]
            elif strategy == "inner-reuse" and i in (4, 6):
                steps = {4: [2, 3], 6: [3, 5]}[i]
            if pipelined or (strategy == "inner-reuse" and i in (4, 6)):
                used = line(h[branch, steps[0]], h[branch, steps[1]], *steps, i)
            if not pipelined or (i % 2 == 1) == (branch == "cond"):
                predictions[branch, i] = net.run(end, used, kept, t, given, size)
            else:
                a, b = steps
                predictions[branch, i] = line(predictions[branch, a], predictions[branch, b], a, b, i)
        cond, uncond = predictions["cond", i], predictions["uncond", i]
        guided[i] = uncond + task.guidance * (cond - uncond)
        if strategy == "step-extrapolation" and i in (4, 6):
            before, a, b = {4: (1, 2, 3), 6: (2, 3, 5)}[i]
            expected = guided[a] + (b - a) / (a - before) * (guided[a] - guided[before])
            fits = (expected - guided[b]).norm() <= (guided[b] - guided[a]).norm()
            guided[i] = guided[b] + fits * (i - b) / (b - a) * (guided[b] - guided[a])
    return guided


@pytest.mark.parametrize("strategy", OURS)
@pytest.mark.parametrize("family", FAMILIES)
def test_our_formulas(family, strategy):
    """`close`: every guided step against the formulas written out by hand on the same latents."""
    reuse = (
        Reuse(start=3, count=4, end=1) if strategy == "guided-pipeline" else Reuse(start=3, count=2, end=1)
    )
    assert strategy == "guided-pipeline" or reuse.spread(8) == [4, 6]
    played = run(family, strategy, 8, reuse)["latents"]
    task = make_task(family, 8)
    with torch.inference_mode():
        guided = by_hand(family, strategy, task, played)
        for i in range(1, 7):
            expected = task.sampler.step(played[i - 1], guided[i], i)
            torch.testing.assert_close(played[i], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("last", "expected"), [(5.0, 7.0), (2.9, 2.9)])
def test_line_only_where_it_would_have_fit(last, expected):
    """Equal: guided predictions 1, 3 and `last` of steps 1, 2, 3; where 1, 3 point too far from `last`, step 4 takes it again."""
    worker = Worker(0, make_task("sd3", 8), LocalTransport())
    for value in (1.0, 3.0, last):
        worker.keep(GUIDED, torch.tensor([value]))
    assert worker.extrapolate(GUIDED, (1, 2, 3), 4).item() == torch.tensor(expected).item()
    assert worker.extrapolate(GUIDED, (2, 3), 4).item() == pytest.approx(2 * last - 3.0)
