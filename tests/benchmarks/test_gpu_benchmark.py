"""`benchmarks/gpu.py` on the CPU: all its parts on small networks with stand-ins, and what it counts and leaves out."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.timing.gpu_tools import Bench, Recording, class_of, count_work, digest, graph_of, show

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "gpu.py"
PARTS = ["graphs", "attention", "sd3-compile", "sdxl-compile", "decode", "diffusers"]


def script(*options: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, options)], capture_output=True, text=True, timeout=300
    )


def test_all_parts_on_small_networks(tmp_path):
    """Nothing fails; `equal` where a graph repeats the call; a compiled network is `equal` to itself compiled again; the tables fit."""
    file = tmp_path / "gpu.json"
    ran = script("--json", file, "--tiny", "--minutes", 5)
    assert ran.returncode == 0, ran.stderr
    results = json.loads(file.read_text())["results"]
    assert list(results) == PARTS
    rows = {f"{part}: {name}": found for part in PARTS for name, found in results[part].items()}
    assert not {name: found["failed"] for name, found in rows.items() if "failed" in found}
    assert all(found.get("equal", True) and found.get("finite", True) for found in rows.values())
    assert (
        results["graphs"]["sdxl 1024 batch 2"]["TFLOP"] > 0
        and "equal" in results["graphs"]["sdxl 1024 batch 2"]
    )
    norms = [
        results["graphs"][f"sd3 1024 batch 1 norms: {kind}"]["digest"]
        for kind in ("own", "F.rms_norm", "weight outside")
    ]
    assert len(set(norms)) == 1  # in fp32 on the CPU
    assert results["graphs"]["sd3 1024 kernels"]["classes"]
    assert any("math ms" in found for found in results["attention"].values())
    # by hand: two kinds of joint blocks (the last has no text output); twelve residual blocks that differ in channels or
    # side, and transformer blocks of two widths
    assert results["sd3-compile"]["blocks, batch 1"]["compiled"] == 2
    assert results["sd3-compile"]["blocks, batch 1, again"]["equal to the first"] is True
    assert results["sdxl-compile"]["blocks, batch 1"]["compiled"] == 14
    assert results["decode"]["bf16"]["PSNR"] > 30
    assert "direct ms" in results["diffusers"]["sd3 1024 batch 1, blocks compiled"]
    table = ran.stdout[ran.stdout.index("\ncard none") :]
    assert max(map(len, table.splitlines())) <= 100 and "sdxl-compile" in table
    shown = script("--json", file, "--show")
    assert shown.returncode == 0 and shown.stdout.strip() == table.strip()


def test_without_time_or_device(tmp_path):
    """A part that would take longer than what is left is left out, and that is said; without a GPU the script refuses."""
    ran = script("--json", tmp_path / "gpu.json", "--tiny", "--minutes", 0, "--only", "decode", "graphs")
    assert ran.returncode == 0 and ran.stdout.count("everything: left out: 0 s are left") == 2, ran.stderr
    assert list(json.loads((tmp_path / "gpu.json").read_text())["results"]) == ["graphs", "decode"]
    if not torch.cuda.is_available():
        refused = script("--json", tmp_path / "other.json")
        assert refused.returncode == 2 and "there is no CUDA device here" in refused.stderr
        assert not (tmp_path / "other.json").exists()


def test_a_failure_is_recorded_and_the_rest_goes_on(tmp_path):
    bench = Bench(tmp_path / "gpu.json", time.monotonic(), 1, True)
    bench.part = "graphs"

    def fail():
        raise RuntimeError("no such kernel")

    bench.measure("first", 1, fail)
    bench.measure("second", 1, lambda: {"graph ms": 2.0})
    bench.tiny, bench.reserve = False, 70.0
    bench.device = "cpu"
    bench.measure("third", 1, lambda: {"graph ms": 3.0}, optional=True)
    rows = json.loads((tmp_path / "gpu.json").read_text())["results"]["graphs"]
    assert rows["first"]["failed"] == "RuntimeError: no such kernel" and rows["second"]["graph ms"] == 2.0
    assert "about 71 are needed" in rows["third"]["left out"]
    assert "first: failed: RuntimeError: no such kernel" in show(bench.kept)


def test_counted_work_by_hand():
    """A linear layer of 8 to 16 for 4 rows has 2 * 4 * 8 * 16 operations; GELU reads and writes 4 * 16 numbers of four bytes; views move nothing."""
    net, x = nn.Linear(8, 16), torch.randn(4, 8)
    with torch.inference_mode():
        work = count_work(lambda: nn.functional.gelu(net(x).view(2, 2, 16).transpose(0, 1)))
    assert work["TFLOP"] == pytest.approx(2 * 4 * 8 * 16 / 1e12)
    assert work["unfused GB"] == pytest.approx(2 * 4 * 16 * 4 / 1e9)


def test_bits_are_compared_on_other_values():
    """A call that does something else the next time is not equal to its graph."""
    calls, x = [], torch.ones(3)

    def counts():
        calls.append(None)
        return x * len(calls)

    assert graph_of(lambda: x * 2, lambda: x.add_(1), False)["equal"]
    assert not graph_of(counts, lambda: x.add_(1), False)["equal"]
    recording = Recording(lambda: x * 2, False)
    x.fill_(5)
    recording.replay()
    assert recording.result.tolist() == [10, 10, 10]


def test_digests_and_classes():
    one = torch.randn(5).half()
    assert digest(one) == digest(one.clone()) != digest(one + 1)
    names = {
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma": "attention",
        "sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc": "convolution",
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT": "matmul",
        "void cudnn::ops::nchwToNhwcKernel<__half, __half, float>": "layout",
        "void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::Half>": "norm",
        "triton_red_fused_native_group_norm_0": "compiled",
        "void at::native::vectorized_elementwise_kernel<8, at::native::GeluCUDAKernelImpl>": "elementwise",
        "something": "other",
    }
    assert {name: class_of(name) for name in names} == names
