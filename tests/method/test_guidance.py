"""Classifier-free guidance: in which precision it is computed, and how strong it is where nobody says."""

import json
import sys

import pytest
import torch
from PIL import Image

import train_free_sample
from hybridiff.denoise import Worker
from hybridiff.distributed.transport import LocalTransport
from hybridiff.guidance import discrepancy
from hybridiff.schedule import DISCREPANCY, GUIDED, Guide, Measure, Step, prediction
from tests.small import random_states, write_single
from tests.tiny import make_task


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_predictions_of_half_precision_are_guided_in_fp32(dtype):
    """`equal` to the formula in fp32, which half precision would round three times; so are the discrepancy and the sampler's step."""
    task = make_task("sdxl", 8, guidance=7.5)
    worker = Worker(0, task, LocalTransport())
    cond, uncond = torch.randn(2, 1, 4, 8, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    worker.store |= {prediction("cond"): cond, prediction("uncond"): uncond}
    for operation in (Measure(), Guide(), Step(GUIDED)):
        worker.perform(operation, 0)
    wide = uncond.float() + 7.5 * (cond.float() - uncond.float())
    assert worker.store[GUIDED].dtype == torch.float32 and torch.equal(worker.store[GUIDED], wide)
    assert not torch.equal(wide, (uncond + 7.5 * (cond - uncond)).float())  # the test can tell them apart
    assert torch.equal(worker.store[DISCREPANCY], discrepancy(cond.float(), uncond.float()))
    start = task.sampler.scale_noise(task.noise)
    assert worker.latents.dtype == torch.float32 and torch.equal(
        worker.latents, task.sampler.step(start, wide, 0)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_only_prediction_of_half_precision_is_stepped_along_in_fp32(dtype):
    """`equal`: without guidance, and in the steps of `paper` that have one prediction."""
    task = make_task("sdxl", 8)
    worker = Worker(0, task, LocalTransport())
    only = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    worker.store[prediction("cond")] = only
    worker.perform(Step(prediction("cond")), 0)
    expected = task.sampler.step(task.sampler.scale_noise(task.noise), only.float(), 0)
    assert worker.latents.dtype == torch.float32 and torch.equal(worker.latents, expected)


@pytest.mark.parametrize("family, guidance", [("sdxl", 5.0), ("sd3", 7.0)])
def test_a_file_that_names_no_guidance_gets_that_of_its_family(family, guidance, tmp_path, monkeypatch):
    """The official single file has no metadata; what the picture was made with stands in the picture."""
    weights = write_single(tmp_path / "official.safetensors", family, random_states(family, torch.float16))
    options = [
        "--weights",
        str(weights),
        "--steps",
        "1",
        "--height",
        "32",
        "--width",
        "32",
        "--out",
        str(tmp_path / "p.png"),
    ]
    monkeypatch.setattr(sys, "argv", ["train_free_sample.py", *options])
    assert train_free_sample.main() == 0
    assert json.loads(Image.open(tmp_path / "p.png").text["settings"])["guidance"] == guidance
