"""Where networks are cut, by size or by measured times, and what weights a rank holds."""

import itertools
import json
import random
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from hybridiff.cost import idle_ranks, runs_of, unit_times
from hybridiff.denoise import Worker
from hybridiff.distributed.transport import LocalTransport
from hybridiff.errors import UsageError
from hybridiff.partition import weights_needed
from hybridiff.pipeline import plan_picture
from hybridiff.request import Request
from hybridiff.schedule import DISCREPANCY, interleave
from hybridiff.strategies import STRATEGIES, Settings
from hybridiff.switching import SwitchRule
from models.mmdit import MMDiT, MMDiTConfig
from models.tape import best_cuts
from models.unet import UNet, UNetConfig
from tests.processes import torchrun
from tests.tiny import make_task, run
from weights.load import open_checkpoint

CAPPED = SwitchRule(window=50, cap=3, interval=5)
ASKED = Request(prompt="", negative_prompt=None, steps=9, guidance=5.0, height=128, width=128, seed=1,
                sampler=None, strategy="paper", rule=CAPPED, dtype=torch.float32)  # fmt: skip


def slowest(times: list[list[float]], cuts: tuple[int, ...]) -> float:
    """The time of the slowest part."""
    ends = [0, *cuts, len(times[0])]
    return max(sum(own[a:b]) for own, a, b in zip(times, ends, ends[1:]))


def test_best_cuts():
    """By hand; and in seeded cases no cuts are better than the chosen ones."""
    assert best_cuts([[1] * 6] * 2) == (3,) and best_cuts([[1, 1, 1, 9]] * 2) == (3,)
    assert best_cuts([[5] * 4] * 4) == (1, 2, 3)
    assert best_cuts([[1] * 6, [2] * 6]) == (4,)  # half as fast, half as much
    rng = random.Random(0)
    for _ in range(50):
        units, segments = rng.randint(2, 8), rng.randint(2, 4)
        segments = min(segments, units)
        times = [[rng.uniform(0.1, 2) for _ in range(units)] for _ in range(segments)]
        every = itertools.combinations(range(1, units), segments - 1)
        assert slowest(times, best_cuts(times)) == min(slowest(times, cuts) for cuts in every)


# positions of the cuts at full size, as the released code (two ranks) and the project's first release had them
FULL_SIZE = [
    (UNet, UNetConfig(), 2, (7, 12)),
    (UNet, UNetConfig(), 4, (5, 7, 8, 11, 12, 14)),
    (UNet, UNetConfig(), 8, (2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 14, 15, 16, 17)),
    (MMDiT, MMDiTConfig(), 2, (12,)),
    (MMDiT, MMDiTConfig(), 4, (6, 12, 18)),
]


@pytest.mark.parametrize("network, config, ranks, cuts", FULL_SIZE)
def test_where_the_networks_are_split(network, config, ranks, cuts):
    with torch.device("meta"):
        net = network(config)
    spans, owners = net.split(ranks)
    assert tuple(start for start, _ in spans[1:]) == cuts and (spans[0][0], spans[-1][1]) == (0, net.units)
    inwards = list(range(ranks))
    assert owners == tuple([*inwards[::-1], *inwards[1:]] if network is UNet else inwards)
    with pytest.raises(ValueError, match="cannot be split over 40 ranks"):
        net.split(40)


def test_a_split_with_both_ends_on_one_rank():
    """What inner-reuse and guided-pipeline ask for: rank 0 owns the units in the middle."""
    with torch.device("meta"):
        assert MMDiT(MMDiTConfig()).split(2, nested=True) == (((0, 6), (6, 18), (18, 24)), (1, 0, 1))
        assert UNet(UNetConfig()).split(2, nested=True) == (((0, 7), (7, 12), (12, 19)), (1, 0, 1))


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_a_slower_device_gets_the_smaller_part(family):
    """Rank 0 three times as slow: its spans, the innermost or the first one, shrink."""
    net = make_task(family, 1).denoiser

    def units_of_rank_0(times: float) -> int:
        split = net.split(2, [[times] * net.units, [1.0] * net.units])
        return sum(stop - start for (start, stop), owner in zip(*split) if owner == 0)

    assert units_of_rank_0(3.0) < units_of_rank_0(1.0)
    assert max(net.split(4, [[1.0] * net.units] * 4).owners) == 3


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 6])
def test_spans_together_are_the_network(family, ranks):
    """`equal`: the prediction of all spans one after the other, however the network is split."""
    task = make_task(family, 1)
    strategy, worker = STRATEGIES["paper"].on(task.denoiser, ranks), Worker(0, task, LocalTransport())
    with torch.inference_mode():
        for span in strategy.partition.spans:
            operation = strategy.partition.run(span, "cond")
            worker.compute(operation, 0)
        whole = task.denoiser(
            task.sampler.scale_input(worker.latents, 0),
            task.sampler.timesteps[:1],
            task.conditioning["cond"],
        )
    assert torch.equal(worker.store[operation.output], whole)


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_every_unit_takes_time(family):
    times = unit_times(make_task(family, 1), repeats=1)
    assert len(times) == make_task(family, 1).denoiser.units and min(times) > 0


@pytest.mark.parametrize("interval", [0, 5])
def test_each_rank_runs_on_the_weights_that_it_holds(interval):
    """`equal` latents where every rank of four has all other weights on the meta device; the spare ranks of the U-Net hold a ring each."""
    rule, steps = replace(CAPPED, interval=interval), 12
    played = run("sdxl", "paper", steps, rule, ranks=4)["latents"]
    task, mailbox = make_task("sdxl", steps), LocalTransport()
    strategy, settings = STRATEGIES["paper"].on(task.denoiser, 4), Settings(steps, rule)
    workers, held = [], []
    for rank in range(4):
        net, names = deepcopy(task.denoiser), weights_needed(task.denoiser, runs_of(strategy, settings, rank))
        state = {
            name: tensor if names is None or name.startswith(names) else tensor.to("meta")
            for name, tensor in net.state_dict().items()
        }
        net.load_state_dict(state, assign=True)
        workers.append(Worker(rank, replace(task, denoiser=net), mailbox))
        held.append(sum(tensor.numel() for tensor in state.values() if not tensor.is_meta))
    assert held[0] == held[2] > sum(held[1::2]) and (min(held) > 0 or interval == 0)
    history: list[float | None] = []
    with torch.inference_mode():
        for step in range(steps):
            plan = strategy.plan(step, history, settings)
            for rank, operation in interleave(
                list(enumerate(plan.operations)), lambda receive, rank: mailbox.arrived(receive.source, rank)
            ):
                workers[rank].perform(operation, step)
            measured = workers[0].store.pop(DISCREPANCY, None)
            history.append(None if measured is None else float(measured))
            assert all(torch.equal(worker.latents, played[step]) for worker in workers)


def test_only_named_weights_are_loaded():
    checkpoint = open_checkpoint("demo-sdxl")
    net = checkpoint.load("denoiser", torch.float16, names=("time_embed.", "input_blocks.3."))
    for name, tensor in net.state_dict().items():
        assert (
            tensor.is_meta != name.startswith(("time_embed.", "input_blocks.3."))
            and tensor.dtype == torch.float16
        )


@pytest.mark.parametrize(
    "family, counts", [("sdxl", "1 process or 2, 4, 6 or 8 ranks"), ("sd3", "1 process or 2, 4 or 6 ranks")]
)
def test_counts_of_ranks(family, counts):
    """Any even number up to what the network allows; others are refused in one sentence that says which work."""
    checkpoint = open_checkpoint(f"demo-{family}")
    for ranks in range(1, 11):
        for name in ("paper", "step-extrapolation"):
            asked = replace(ASKED, strategy=name)
            if ranks == 1 or str(ranks) in counts.partition("or")[2]:
                strategy = plan_picture(checkpoint, asked, ranks).strategy
                assert strategy.ranks == max(strategy.partition.owners) + 1 == max(2, ranks)
            else:
                with pytest.raises(UsageError, match=f"runs on {counts} with this network, not on {ranks}"):
                    plan_picture(checkpoint, asked, ranks)
    with pytest.raises(UsageError, match="runs on 1 process or 2 ranks, not on 4"):
        plan_picture(checkpoint, replace(ASKED, strategy="inner-reuse"), 4)
    if family == "sd3":
        with pytest.raises(UsageError, match="`height` 16 is 2 rows of patches, too few for 6 ranks"):
            plan_picture(checkpoint, replace(ASKED, height=16), 6)


def test_idle_ranks_are_named():
    for name, words in (
        ("paper", "idle outside of the middle stage: ranks 1, 3"),
        ("step-extrapolation", "idle all the time: ranks 1, 3"),
    ):
        net = make_task("sdxl", 1).denoiser
        assert idle_ranks(STRATEGIES[name].on(net, 4), Settings(20, CAPPED)).startswith(words)
        assert idle_ranks(STRATEGIES[name].on(net), Settings(20, CAPPED)) is None
    strategy = STRATEGIES["paper"].on(make_task("sd3", 1).denoiser, 4)
    assert idle_ranks(strategy, Settings(20, CAPPED)) is None


def test_balance_on_four_ranks(tmp_path):
    """The cut is told, stored, and the same on every rank, or else they would wait for each other."""
    options = [
        "--strategy",
        "paper",
        "--steps",
        "8",
        "--window",
        "9",
        "--cap",
        "2",
        "--interval",
        "4",
        "--seed",
        "1",
        "--balance",
    ]
    ran = torchrun(*options, "--out", str(tmp_path / "p.png"), "--report", str(tmp_path / "r"), ranks=4)
    assert ran.returncode == 0, ran.stderr
    use = json.loads((tmp_path / "r" / "report.json").read_text())["use"]
    spans = ", ".join(f"{start}-{stop - 1}" for start, stop in use["cuts"])
    assert f"spans of units {spans}, after timing" in ran.stdout and len(use["cuts"]) == 7
    assert [len(times) for times in use["seconds_of_units"]] == [19] * 4
    assert use["weights"][0] == use["weights"][2] > use["weights"][1] + use["weights"][3]
    assert "idle outside of the middle stage: ranks 1, 3" in ran.stdout
    few = torchrun(
        *options, "--interval", "1", "--out", str(tmp_path / "few.png"), ranks=4
    )  # ranks 1 and 3 run nothing, but are timed
    assert few.returncode == 0 and (tmp_path / "few.png").exists(), few.stderr
