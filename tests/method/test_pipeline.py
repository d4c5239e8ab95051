"""The whole of `serial`, prompt to pixels, against diffusers' pipelines in fp32 on small random checkpoints.

Latents are `close` to 1e-4 relative and pixels to 1/255 (sums run in another order there: both branches in one batch);
the two layouts of one checkpoint are `equal`. No prompt here holds "!": the official tokenizer_2 declares it as its
padding, so that diffusers takes it for id 0 and not for the vocabulary's word.
"""

import functools
import json
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
from safetensors.torch import load_file, save_file
from torch import Tensor

from hybridiff.distributed.transport import LocalTransport
from hybridiff.pipeline import Result, draw_noise, generate, plan_picture
from hybridiff.request import Request
from hybridiff.text import encode
from tests.method.test_samplers import BETAS, relative
from tests.models.test_tokenizers import t5_oracle
from tests.small import CLIP, RULES, random_states, write_folder, write_single
from weights.load import open_checkpoint

torch.set_num_threads(1)
FACTOR, CHANNELS = 4, {"sdxl": 4, "sd3": 16}  # of the autoencoders in small.py
TEXT, NEGATIVE = "a red circle on blue", "a green square"
LONG = "a small yellow triangle above two large red circles and a green square on a dark blue ground, " * 15
DEFAULT = Request(prompt=TEXT, negative_prompt=NEGATIVE, steps=4, guidance=5.0, height=40, width=40, seed=3,
                  sampler=None, strategy="serial", rule=RULES["sdxl"], dtype=torch.float32)  # fmt: skip
WIDE, TALL = dict(height=24, width=72), dict(height=56, width=40)
NONE, EMPTY = dict(negative_prompt=None), dict(negative_prompt="")
CASES = [  # checkpoint, what is asked for
    ("sdxl", dict(sampler="euler", **WIDE)),
    ("sdxl", dict(sampler="euler", steps=6, **NONE)),
    ("sdxl", dict(sampler="euler", prompt="", **EMPTY, **TALL)),
    ("sdxl", dict(sampler="euler", prompt=LONG, negative_prompt=LONG[20:])),
    ("sdxl", dict(sampler="ddim", **TALL)),
    ("sdxl", dict(sampler="ddim", prompt="", **NONE)),
    ("sdxl encoded", dict(sampler="ddim", **NONE)),
    ("sdxl", dict(sampler="ddim", guidance=1.0, steps=6, **EMPTY)),
    ("sdxl", dict(sampler="euler", guidance=0.5)),
    ("sdxl", dict(sampler="euler", guidance=1.5)),
    ("sd3", WIDE),
    ("sd3", dict(steps=6, **NONE, **TALL)),
    ("sd3", dict(prompt="", **EMPTY)),
    ("sd3", dict(guidance=0.0)),
    ("sd3", dict(prompt=LONG, negative_prompt=LONG[20:], **WIDE)),
    ("sd3 without T5", WIDE),
    ("sd3 without T5", dict(prompt="", **NONE)),
    ("sd3 projected", TALL),
    ("sd3 shifted", dict(guidance=3.5)),
]
SCHEDULERS = {  # with the official folders' settings
    "ddim": functools.partial(DDIMScheduler, **BETAS, clip_sample=False, set_alpha_to_one=False),
    "euler": functools.partial(EulerDiscreteScheduler, **BETAS),
    None: functools.partial(FlowMatchEulerDiscreteScheduler, shift=3.0),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both families, SDXL that encodes an absent negative prompt, and SD3 without T5, with a projection of CLIP-L that is not the identity, with another shift."""
    home = tmp_path_factory.mktemp("folders")
    found = {
        family: write_folder(home / family, family, random_states(family, torch.float32))
        for family in CHANNELS
    }
    project(found["sd3"] / "text_encoder", torch.eye(64))  # the official folder has one too
    for name in ("sd3 without T5", "sd3 projected", "sd3 shifted"):
        found[name] = shutil.copytree(found["sd3"], home / name)
    found["sdxl encoded"] = shutil.copytree(found["sdxl"], home / "sdxl encoded")
    (found["sdxl encoded"] / "model_index.json").write_text('{"force_zeros_for_empty_prompt": false}')
    shutil.rmtree(found["sd3 without T5"] / "text_encoder_3")
    projection = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) / 8
    project(found["sd3 projected"] / "text_encoder", projection)
    FlowMatchEulerDiscreteScheduler(shift=1.7).save_pretrained(found["sd3 shifted"] / "scheduler")
    return found


def project(folder: Path, projection: Tensor) -> None:
    """Give the text encoder in a folder this projection of its pooled state, and the official names, which some versions of transformers shorten."""
    file, config = folder / "model.safetensors", folder / "config.json"
    tensors = {
        f"text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in load_file(file).items()
        if name != "text_projection.weight"
    }
    save_file(tensors | {"text_projection.weight": projection}, file, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"projection_dim": len(projection)}))


@functools.cache
def pipeline_of(folder: Path) -> StableDiffusionXLPipeline | StableDiffusion3Pipeline:
    """diffusers' pipeline on a folder."""
    read, length = transformers.CLIPTokenizerFast.from_pretrained, dict(model_max_length=CLIP["positions"])
    plain, projected = transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection
    parts = dict(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder_2=projected.from_pretrained(folder / "text_encoder_2"),
        tokenizer=read(folder / "tokenizer", **length),
        tokenizer_2=read(folder / "tokenizer_2", **length, pad_token="!"),
    )
    if (folder / "unet").is_dir():
        unet = UNet2DConditionModel.from_pretrained(folder / "unet")
        parts |= dict(unet=unet, text_encoder=plain.from_pretrained(folder / "text_encoder"))
        index = folder / "model_index.json"
        settings = json.loads(index.read_text()) if index.is_file() else {}
        pipeline = StableDiffusionXLPipeline(
            **parts, **settings, scheduler=SCHEDULERS["euler"](), add_watermarker=False
        )
    else:
        network = SD3Transformer2DModel.from_pretrained(folder / "transformer")
        parts |= dict(transformer=network, text_encoder=projected.from_pretrained(folder / "text_encoder"))
        t5 = dict(text_encoder_3=None, tokenizer_3=None)
        if (folder / "text_encoder_3").is_dir():
            t5 = dict(text_encoder_3=transformers.T5EncoderModel.from_pretrained(folder / "text_encoder_3"),
                      tokenizer_3=t5_oracle(folder / "tokenizer_3" / "spiece.model"))  # fmt: skip
        pipeline = StableDiffusion3Pipeline(**parts, **t5, scheduler=SCHEDULERS[None]())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(folder: Path, asked: Request, **start: Tensor | torch.Generator) -> tuple[Tensor, Tensor]:
    """diffusers' last latents, and its image (height, width, 3) in 0 .. 255, not rounded."""
    pipeline, seen = pipeline_of(folder), {}
    pipeline.scheduler = SCHEDULERS[asked.sampler]()
    if (folder / "scheduler").is_dir():
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    image = pipeline(
        asked.prompt, negative_prompt=asked.negative_prompt, num_inference_steps=asked.steps, height=asked.height,
        width=asked.width, guidance_scale=asked.guidance, output_type="pt", **start,
        callback_on_step_end=lambda _, step, t, tensors: seen.update(tensors) or {},
    ).images[0]  # fmt: skip
    return seen["latents"], 255 * image.permute(1, 2, 0)  # (3, H, W) -> (H, W, 3)


@functools.cache
def ours(path: Path, asked: Request) -> Result:
    """One picture, made by the command line's own function."""
    checkpoint = open_checkpoint(str(path))
    return generate(checkpoint, plan_picture(checkpoint, asked, 1), LocalTransport(), torch.device("cpu"))


def noise_of(family: str, asked: Request) -> Tensor:
    return draw_noise((1, CHANNELS[family], asked.height // FACTOR, asked.width // FACTOR), asked.seed)


@pytest.mark.parametrize("name, options", CASES)
def test_serial_is_close_to_diffusers(folders: dict[str, Path], name: str, options: dict):
    """Ours is rounded to whole counts, theirs not: what is left beside that half count is the difference in floats."""
    asked = replace(DEFAULT, **options)
    result = ours(folders[name], asked)
    latents, image = theirs(folders[name], asked, latents=noise_of(name.split()[0], asked))
    assert relative(result.records[-1].latents, latents) <= 1e-4
    assert (result.image - image).abs().max() <= 0.5 + 0.05


@pytest.mark.parametrize("name, sampler", [("sdxl", "ddim"), ("sdxl", "euler"), ("sd3", None)])
def test_one_seed_is_one_picture(folders: dict[str, Path], name: str, sampler: str | None):
    """`close`, with noise that diffusers draws for itself on the CPU."""
    asked = replace(DEFAULT, sampler=sampler)
    latents, _ = theirs(folders[name], asked, generator=torch.Generator("cpu").manual_seed(asked.seed))
    assert relative(ours(folders[name], asked).records[-1].latents, latents) <= 1e-4


def test_what_is_compared_matters(folders: dict[str, Path]):
    """Each thing that the cases vary moves the latents far beyond the tolerance; in SD3 no negative is an empty one."""

    def latents(name: str, **options) -> Tensor:
        return ours(folders[name], replace(DEFAULT, **options)).records[-1].latents

    for family in CHANNELS:
        for options in (dict(prompt=""), dict(prompt=LONG), NONE, EMPTY):
            assert relative(latents(family, **options), latents(family)) > 1e-2
    for name in ("without T5", "projected", "shifted"):
        assert relative(latents(f"sd3 {name}"), latents("sd3")) > 1e-2
    assert relative(latents("sdxl", **NONE), latents("sdxl", **EMPTY)) > 1e-2
    for name in ("sd3", "sdxl encoded"):
        assert torch.equal(latents(name, **NONE), latents(name, **EMPTY))


def test_sdxl_without_a_negative_prompt_is_told_zeros(folders: dict[str, Path]):
    """`equal`: text and pooled text are zeros, the sizes are not; an empty negative prompt is encoded."""
    for negative, zeros in ((None, True), ("", False)):
        told = encode(
            open_checkpoint(str(folders["sdxl"])), TEXT, negative, 40, 40, torch.device("cpu"), torch.float32
        )
        text, pooled, sizes = (
            told["uncond"].text,
            told["uncond"].vector[:, :128],
            told["uncond"].vector[:, 128:],
        )
        assert (not text.any(), not pooled.any()) == (zeros, zeros)
        assert torch.equal(sizes, told["cond"].vector[:, 128:]) and sizes.any()


@pytest.mark.parametrize("name", ["sdxl", "sd3", "sd3 without T5"])
def test_both_layouts_are_equal(name: str, tmp_path: Path):
    """`equal`: the latents after every step, and the image.

    Stored in fp16, as the official files are. Weights that are used in the file's own dtype stay where the file has
    them, and products with matrices differ in the last bit with the place in memory (1e-6 relative here).
    """
    family = name.split()[0]
    states = random_states(family, torch.float16)
    if name == "sd3 without T5":
        del states["t5"]
    folder = write_folder(tmp_path / "folder", family, states)
    if family == "sd3":
        project(folder / "text_encoder", torch.eye(64, dtype=torch.float16))
    single = write_single(tmp_path / "model.safetensors", family, states)
    first, second = (ours(path, replace(DEFAULT, **WIDE)) for path in (single, folder))
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(first.records, second.records, strict=True))
    assert torch.equal(first.image, second.image)
