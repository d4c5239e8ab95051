"""The whole of `serial`, prompt to pixels, against the pipelines of diffusers in fp32 on small random checkpoints.

Latents are `close` to 1e-4 relative (batch 2 and other kernels there), pixels to 1/255; the two layouts of one
checkpoint give `equal` latents.
"""

import functools
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from small import CLIP, random_states, write_folder, write_single
from test_samplers import BETAS, relative
from test_tokenizers import t5_oracle
from torch import Tensor

from hybridiff.pipeline import PAPER_RULES, Request, Result, draw_noise, generate
from hybridiff.text import encode
from hybridiff.transport import Mailbox
from weights.load import open_checkpoint

torch.set_num_threads(1)
ASKED = Request(prompt="a red circle on blue", negative_prompt="a green square", steps=4, guidance=5.0, height=32, width=48,
                seed=3, sampler=None, strategy="serial", rule=PAPER_RULES["sdxl"], dtype=torch.float32)  # fmt: skip
LONG = "a small yellow triangle above two large red circles and a green square on a dark blue ground, " * 3
PROMPTS = [  # prompt, negative prompt
    ("a red circle on blue", "a green square"),
    ("a red circle on blue", None),
    ("a red circle on blue", ""),
    ("", None),
    ("", ""),
    (LONG, LONG[:200] + "other words"),
]
SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
    "euler": lambda: EulerDiscreteScheduler(**BETAS, use_karras_sigmas=False),  # as the official SDXL folder has it
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),  # as the official SD3 folder has it
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoints, by family; "sd3 folder" has CLIP-L's projection, as the official one, here the identity."""
    home, found = tmp_path_factory.mktemp("pipeline"), {}
    for family in ("sdxl", "sd3"):
        states = random_states(family, torch.float32)
        found[f"{family} folder"] = write_folder(home / family, family, states)
        for name in ("single", "single without T5"):
            (home / f"{family} {name}").mkdir()
            file = home / f"{family} {name}" / "model.safetensors"
            kept = {part: state for part, state in states.items() if (part, name) != ("t5", "single without T5")}
            found[f"{family} {name}"] = write_single(file, family, kept)
    width = states["clip_l"]["text_model.final_layer_norm.weight"].numel()
    for name, projection in (("folder", torch.eye(width)), ("projected", torch.randn(width, width) / width**0.5)):
        if name != "folder":
            found[f"sd3 {name}"] = shutil.copytree(found["sd3 folder"], home / name)
        project(found[f"sd3 {name}"] / "text_encoder", projection)
    found["sd3 without T5"] = shutil.copytree(found["sd3 folder"], home / "without T5")
    shutil.rmtree(found["sd3 without T5"] / "text_encoder_3")
    return found


def project(folder: Path, projection: Tensor) -> None:
    """Give the text encoder in a folder a projection of its pooled state."""
    plain = transformers.CLIPTextModel.from_pretrained(folder)
    config = transformers.CLIPTextConfig.from_dict(plain.config.to_dict() | {"projection_dim": len(projection)})
    projected = transformers.CLIPTextModelWithProjection(config)
    missing = projected.load_state_dict(plain.state_dict(), strict=False).missing_keys
    print(missing, list(plain.state_dict())[:2], list(projected.state_dict())[:2])
    projected.text_projection.weight.data.copy_(projection)
    projected.save_pretrained(folder)


@functools.cache
def original(folder: Path) -> StableDiffusionXLPipeline | StableDiffusion3Pipeline:
    """The pipeline of diffusers on a folder."""
    clip = {"model_max_length": CLIP["positions"]}
    read = transformers.CLIPTokenizerFast.from_pretrained
    projected = transformers.CLIPTextModelWithProjection.from_pretrained
    parts = {
        "vae": AutoencoderKL.from_pretrained(folder / "vae"),
        "tokenizer": read(folder / "tokenizer", **clip),
        "tokenizer_2": read(folder / "tokenizer_2", **clip, pad_token="!"),  # id 0, as in the official folders
        "text_encoder_2": projected(folder / "text_encoder_2"),
    }
    if (folder / "unet").is_dir():
        pipeline = StableDiffusionXLPipeline(
            **parts, text_encoder=transformers.CLIPTextModel.from_pretrained(folder / "text_encoder"),
            unet=UNet2DConditionModel.from_pretrained(folder / "unet"), scheduler=SCHEDULERS["euler"](),
            add_watermarker=False,
        )  # fmt: skip
    else:
        t5 = (folder / "text_encoder_3").is_dir()
        pipeline = StableDiffusion3Pipeline(
            **parts, text_encoder=projected(folder / "text_encoder"), scheduler=SCHEDULERS["flow"](),
            transformer=SD3Transformer2DModel.from_pretrained(folder / "transformer"),
            text_encoder_3=transformers.T5EncoderModel.from_pretrained(folder / "text_encoder_3") if t5 else None,
            tokenizer_3=t5_oracle(folder / "tokenizer_3" / "spiece.model") if t5 else None,
        )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(folder: Path, asked: Request, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and image (height, width, 3), in 0 .. 255 but not rounded, of diffusers."""
    pipeline, last = original(folder), {}
    pipeline.scheduler = SCHEDULERS[asked.sampler or ("ddim" if (folder / "unet").is_dir() else "flow")]()

    def keep(pipeline, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict:
        last["latents"] = tensors["latents"].clone()
        return {}

    image = pipeline(
        asked.prompt, negative_prompt=asked.negative_prompt, num_inference_steps=asked.steps, height=asked.height,
        width=asked.width, guidance_scale=asked.guidance, latents=noise, output_type="pt", callback_on_step_end=keep,
    ).images[0]  # fmt: skip
    return last["latents"], 255 * image.permute(1, 2, 0)


def ours(path: Path, asked: Request) -> Result:
    return generate(open_checkpoint(str(path)), asked, Mailbox(), torch.device("cpu"))


def assert_close(path: Path, asked: Request) -> None:
    """Latents within 1e-4 relative; pixels within 1/255."""
    result = ours(path, asked)
    latents, image = theirs(path, asked, draw_noise(result.records[-1].latents.shape[1], asked.height // 4, asked.width // 4, asked.seed))
    print("REL", relative(result.records[-1].latents, latents), "PIX", (result.image - image).abs().max().item(), "INSIDE", ((image > 1) & (image < 254)).float().mean().item(), latents.abs().max().item())
    assert relative(result.records[-1].latents, latents) <= 1e-4


@pytest.mark.parametrize("prompt, negative", PROMPTS)
@pytest.mark.parametrize("place, sampler", [("sdxl folder", "euler"), ("sdxl folder", "ddim"), ("sd3 folder", None), ("sd3 without T5", None), ("sd3 projected", None)])
def test_close(places, place, sampler, prompt, negative):
    assert_close(places[place], replace(ASKED, prompt=prompt, negative_prompt=negative, sampler=sampler))
