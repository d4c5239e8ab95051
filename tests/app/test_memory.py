"""Peak memory is what the operating system says; a run that plainly needs more than there is is refused, others are not."""

import json
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hybridiff.app.memory
import train_free_sample
from hybridiff.app.memory import FEATURES, Place, demands, refuse_too_large
from hybridiff.errors import UsageError
from hybridiff.request import Request
from models.autoencoder import Autoencoder, AutoencoderConfig
from tests.full_size import make_task
from tests.small import RULES
from weights.load import open_checkpoint

CPU = torch.device("cpu")
REQUEST = Request(prompt="a red circle", negative_prompt=None, steps=3, guidance=5.0, height=2048, width=2048, seed=3, sampler=None, strategy="condition",
                  rule=RULES["sdxl"], dtype=torch.float32)  # fmt: skip


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive at once, also on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def gone(self, key: int, size: int) -> None:
        self.now -= size
        self.seen.discard(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if (
                isinstance(tensor, torch.Tensor)
                and (key := (storage := tensor.untyped_storage())._cdata) not in self.seen
            ):
                self.seen.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made


class NoScores(TorchFunctionMode):
    """Attention as fused kernels do it, without the matrix of scores, which the meta device would make."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (
            torch.empty_like(args[0])
            if func is F.scaled_dot_product_attention
            else func(*args, **(kwargs or {}))
        )


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_a_denoiser_needs_no_less_than_is_said(family: str):
    """At full size, fp16: the features counted are below what lives at once, and not by far."""
    task = make_task(family, 1024, 2, torch.float16)
    width = 320 * 128 * 128 if family == "sdxl" else 1536 * 64 * 64
    with torch.inference_mode(), Live() as live, NoScores():
        task.denoiser(
            torch.empty(task.noise.shape, dtype=torch.float16, device="meta"),
            torch.empty(1, device="meta"),
            task.conditioning["cond"],
        )
    assert FEATURES * width * 2 <= live.peak <= 4 * FEATURES * width * 2


def test_a_decoder_needs_no_less_than_is_said():
    with torch.device("meta"):
        vae = Autoencoder(AutoencoderConfig()).eval()
    with torch.inference_mode(), Live() as live, NoScores():
        vae.decode(torch.empty(1, 4, 64, 64, device="meta"))
    said = 3 * 512 * 512 * 4 * 128 * 2
    assert said <= live.peak <= 1.1 * said


def test_the_report_tells_the_systems_figure(tmp_path: Path):
    """`close`: the highest resident set of the whole process, which the system tells when the picture is made (the end of a process takes more under CUDA)."""
    options = [
        "--steps",
        "2",
        "--seed",
        "1",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "p.png"),
        "--report",
        str(tmp_path),
    ]
    between = "import subprocess, sys; subprocess.run(sys.argv[1:], check=True)"  # a child of this process would count what this process has
    within = "import resource, train_free_sample; train_free_sample.main(); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    ran = subprocess.run([sys.executable, "-c", between, sys.executable, "-c", within, *options], capture_output=True, text=True, check=True,
                         cwd=Path(train_free_sample.__file__).parent)  # fmt: skip
    highest = int(ran.stdout.split()[-1]) * 1024
    (rank,) = json.loads((tmp_path / "report.json").read_text())["memory"]
    assert 0.9 * highest <= rank["peak"]["host"] <= highest
    assert {"start", "text", "load", "warm-up", "decode"} <= rank["phases"].keys()
    assert rank["peak"]["host"] == max(phase["host"] for phase in rank["phases"].values())
    assert "Memory" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_refused_with_figures_and_advice(family: str, monkeypatch: pytest.MonkeyPatch):
    """One byte less than the largest need is refused, the need itself is not."""
    checkpoint = open_checkpoint(f"demo-{family}")
    need = max(
        host for _, host, _ in demands(checkpoint, REQUEST, Place(cuda=False, ranks=2, sharing=1, kept=False))
    )
    monkeypatch.setattr(hybridiff.app.memory, "free_host", lambda: need)
    refuse_too_large(checkpoint, REQUEST, CPU, 2, 2, kept=False)
    monkeypatch.setattr(hybridiff.app.memory, "free_host", lambda: need - 1)
    with pytest.raises(UsageError) as caught:
        refuse_too_large(checkpoint, REQUEST, CPU, 2, 2, kept=False)
    assert (
        f"{need / 1e9:,.1f} GB" in str(caught.value)
        and "--tiles" in str(caught.value)
        and "smaller --height" in str(caught.value)
    )
    refuse_too_large(checkpoint, replace(REQUEST, tiles=True), CPU, 2, 2, kept=False)


@pytest.mark.parametrize("family, counted", [("sdxl", 2), ("sd3", 4)])
def test_spare_ranks_of_a_u_net_do_not_count(family: str, counted: int, monkeypatch: pytest.MonkeyPatch):
    """Of four ranks that make one picture two hold SDXL's whole network, all four SD3's; of two teams one has nothing to do."""
    asked = []
    monkeypatch.setattr(
        hybridiff.app.memory, "demands", lambda checkpoint, request, where: asked.append(where.ranks) or []
    )
    for world, team, kept in ((4, 4, False), (4, 2, False), (4, 2, True)):
        refuse_too_large(open_checkpoint(f"demo-{family}"), REQUEST, CPU, world, team, kept)
    assert asked == [counted, 2, 4]


def test_networks_that_stay_add_up(monkeypatch: pytest.MonkeyPatch):
    """With several pictures everything stays loaded, which one picture a run avoids."""
    checkpoint, small = open_checkpoint("demo-sd3"), replace(REQUEST, height=128, width=128)
    alone, kept = (
        [gpu for _, _, gpu in demands(checkpoint, small, Place(True, 2, 1, kept))] for kept in (False, True)
    )
    assert kept[0] == alone[0] and kept[-1] > sum(alone[:3]) + alone[-1]
    monkeypatch.setattr(
        hybridiff.app.memory,
        "demands",
        lambda checkpoint, request, where: [("the decoder", 9 if where.kept else 5, 0)],
    )
    monkeypatch.setattr(hybridiff.app.memory, "free_host", lambda: 7)
    refuse_too_large(checkpoint, small, CPU, 1, 1, kept=False)
    with pytest.raises(UsageError, match="try one picture a run"):
        refuse_too_large(checkpoint, small, CPU, 1, 1, kept=True)


def test_weights_of_the_file_need_no_memory_of_their_own():
    """Used in the dtype in which they are stored they stay in the file; in another, every rank converts its own."""
    checkpoint = open_checkpoint("demo-sd3")
    stored = checkpoint.dtype("denoiser")
    other = torch.float32 if stored != torch.float32 else torch.float16
    sizes = [
        next(
            host
            for words, host, _ in demands(
                checkpoint, replace(REQUEST, dtype=dtype), Place(False, 2, 1, False)
            )
            if "denoiser" in words
        )
        for dtype in (stored, other)
    ]
    count = sum(tensor.numel() for tensor in checkpoint.part("denoiser").module.state_dict().values())
    assert sizes[0] / stored.itemsize * other.itemsize + 1.9 * count * other.itemsize < sizes[1]
