"""A NaN names the stage and the tensor where it appeared; large pictures are decoded in tiles on request."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hybridiff.pipeline
from hybridiff.distributed.transport import LocalTransport
from hybridiff.errors import UsageError
from hybridiff.pipeline import decode, generate, plan_picture
from hybridiff.request import Request
from tests.small import PREFIXES, RULES, random_states, write_single
from weights.load import open_checkpoint

torch.set_num_threads(1)
CPU = torch.device("cpu")
REQUEST = Request(prompt="a red circle", negative_prompt="blue", steps=3, guidance=5.0, height=40, width=40, seed=3,
                  sampler=None, strategy="serial", rule=RULES["sdxl"], dtype=torch.float32)  # fmt: skip


@pytest.mark.parametrize("family, part, key, words", [
    ("sdxl", "clip_l", "text_model.encoder.layers.0.mlp.fc1.bias", ("text encoder clip_l", "of the text")),
    ("sdxl", "clip_g", "text_projection.weight", ("text encoder clip_g", "of the pooled text")),
    ("sd3", "t5", "encoder.final_layer_norm.weight", ("text encoder t5", "of the text")),
    ("sdxl", "denoiser", "out.2.bias", ("denoiser, step 0 (warm-up)", "latents")),
    ("sdxl", "vae", "decoder.conv_out.bias", ("decoder", "image")),
])  # fmt: skip
def test_nan_names_stage_and_tensor(family: str, part: str, key: str, words: tuple[str, ...], tmp_path: Path):
    states = random_states(family, torch.float32)
    states[part][key][0] = torch.nan
    checkpoint = open_checkpoint(str(write_single(tmp_path / "m.safetensors", family, states)))
    with pytest.raises(UsageError) as caught:
        generate(checkpoint, plan_picture(checkpoint, REQUEST, 1), LocalTransport(), CPU)
    assert all(word in str(caught.value) for word in words), caught.value
    assert f"tensor {PREFIXES[family][part]}{key.removesuffix('.weight')}" in str(caught.value)
    assert f"in {tmp_path / 'm.safetensors'} holds NaN or infinity" in str(caught.value)
    assert "--dtype" not in str(caught.value)


@pytest.mark.parametrize("part, key, dtype, words", [
    ("clip_g", "text_projection.weight", torch.float32, "the weights are finite, so take a file with another text encoder"),
    ("clip_g", "text_projection.weight", torch.bfloat16, "try `dtype` float32, or"),
    ("clip_g", "text_projection.weight", torch.float16, "try `dtype` bfloat16 or float32, or"),
    ("denoiser", "out.2.weight", torch.float32, "the weights are finite, so try a smaller `guidance`"),
    ("denoiser", "out.2.weight", torch.bfloat16, "try `dtype` float32, or try a smaller `guidance`"),
    ("vae", "decoder.conv_out.weight", torch.bfloat16, "the weights are finite, so take a file with another autoencoder"),
])  # fmt: skip
def test_finite_weights_that_overflow(part: str, key: str, dtype: torch.dtype, words: str, tmp_path: Path):
    """Another precision is advised only where there is one with more room; the autoencoder always computes in fp32."""
    states = random_states("sdxl", torch.float32)
    states[part][key].fill_(3e38)
    checkpoint = open_checkpoint(str(write_single(tmp_path / "m.safetensors", "sdxl", states)))
    with pytest.raises(UsageError) as caught:
        generate(
            checkpoint, plan_picture(checkpoint, replace(REQUEST, dtype=dtype), 1), LocalTransport(), CPU
        )
    assert words in str(caught.value) and "holds NaN" not in str(caught.value)


def test_tiles_are_used_above_the_limit_alone(monkeypatch: pytest.MonkeyPatch):
    """`equal` without the option or below a megapixel; with it the tiled decoder is called, `close` to one level."""
    checkpoint, latents = open_checkpoint("demo-sdxl"), torch.randn(1, 4, 16, 20)
    whole = decode(checkpoint, latents, CPU)
    assert torch.equal(decode(checkpoint, latents, CPU, tiles=True), whole)
    calls = []
    tiled = hybridiff.pipeline.decode_tiled
    monkeypatch.setattr(hybridiff.pipeline, "decode_tiled", lambda *given: calls.append(1) or tiled(*given))
    monkeypatch.setattr(hybridiff.pipeline, "LARGE", 128 * 128)
    image = decode(checkpoint, latents, CPU, tiles=True)
    assert calls and (image.int() - whole.int()).abs().max() <= 1
