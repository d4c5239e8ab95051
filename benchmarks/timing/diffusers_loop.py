"""diffusers' own networks and pipelines with our weights, for `benchmarks/speed.py`."""

import time

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from hybridiff.denoise import Task
from hybridiff.samplers import TRAINING_STEPS
from models.mmdit import MMDiT, MMDiTConfig
from models.unet import UNetConfig
from tests.full_size import FACTOR, size_width, texts
from tests.small import undo
from weights.names import translate


def unet_sizes(c: UNetConfig) -> dict:
    """Arguments of UNet2DConditionModel for a config of ours."""
    attention = [depth > 0 for depth in c.depths]
    width = size_width(c)
    return dict(
        block_out_channels=[c.channels * m for m in c.multipliers], layers_per_block=c.blocks, norm_num_groups=c.groups,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
        transformer_layers_per_block=[max(1, depth) for depth in c.depths], attention_head_dim=c.heads,
        cross_attention_dim=c.context_width, use_linear_projection=c.linear_projections, addition_embed_type="text_time",
        addition_time_embed_dim=width, projection_class_embeddings_input_dim=c.vector_width,
    )  # fmt: skip


def mmdit_sizes(c: MMDiTConfig) -> dict:
    """Arguments of SD3Transformer2DModel for a config of ours."""
    return dict(
        patch_size=c.patch, in_channels=c.latent_channels, out_channels=c.latent_channels, num_layers=c.depth,
        num_attention_heads=c.heads, attention_head_dim=c.width // c.heads, joint_attention_dim=c.context_width,
        caption_projection_dim=c.width, pooled_projection_dim=c.pooled_width, pos_embed_max_size=c.positions,
    )  # fmt: skip


def carry(net: nn.Module, side: int) -> nn.Module:
    """Their network with the weights of ours, copied; `side` of the latents is only their default."""
    mmdit = isinstance(net, MMDiT)
    make, sizes = (SD3Transformer2DModel, mmdit_sizes) if mmdit else (UNet2DConditionModel, unet_sizes)
    with torch.device("meta"):
        theirs = make(sample_size=side, **sizes(net.config))
    sources, _ = translate(type(net), theirs.state_dict())
    theirs.load_state_dict(undo(sources, net.state_dict()), strict=True, assign=True)
    return theirs.eval().requires_grad_(False)


def make_pipeline(task: Task, family: str, theirs: nn.Module):
    """Their pipeline around their network, no text encoders and no autoencoder; quiet."""
    if family == "sdxl":
        scheduler = DDIMScheduler(
            num_train_timesteps=TRAINING_STEPS, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
            clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading",
        )  # fmt: skip
        names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        pipeline = StableDiffusionXLPipeline(**dict.fromkeys(names), unet=theirs, scheduler=scheduler)
    else:
        names = ("vae", *(f"{name}{i}" for name in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")))
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipeline = StableDiffusion3Pipeline(**dict.fromkeys(names), transformer=theirs, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.inference_mode()
def run(task: Task, family: str, size: int, steps: int) -> dict:
    """Seconds of every step of their pipeline, latents in to latents out, and how far one prediction is from ours.

    The first step runs from the call, so it holds what the pipeline prepares.
    """
    t = task.sampler.timesteps[:1]
    told = task.conditioning["cond"]
    given = texts(family, task.denoiser.config, size, told.text.dtype)
    ours = task.denoiser(task.noise.to(told.text.dtype), t, told)
    theirs = carry(task.denoiser, size // FACTOR)
    dtype = told.text.dtype
    task.denoiser.to("meta")  # its weights are not needed any more
    pipeline = make_pipeline(task, family, theirs)
    text, pooled = given["cond"]
    if family == "sdxl":
        sizes = torch.tensor([[size, size, 0, 0, size, size]], dtype=dtype)
        added = {"text_embeds": pooled, "time_ids": sizes}
        expected = theirs(task.noise.to(dtype), t, text, added_cond_kwargs=added).sample
    else:
        expected = theirs(task.noise.to(dtype), text, pooled, t).sample
    difference = ((ours - expected).float().norm() / expected.float().norm()).item()

    ends: list[float] = []

    def on_step(pipeline, i: int, t: Tensor, tensors: dict) -> dict:
        ends.append(time.perf_counter())
        return {}

    def call(count: int) -> Tensor:
        return pipeline(
            height=size, width=size, num_inference_steps=count, guidance_scale=task.guidance, output_type="latent",
            latents=task.noise.to(dtype), prompt_embeds=text, pooled_prompt_embeds=pooled, callback_on_step_end=on_step,
            negative_prompt_embeds=given["uncond"][0], negative_pooled_prompt_embeds=given["uncond"][1],
        ).images  # fmt: skip

    call(1)  # warm-up
    ends.clear()
    start = time.perf_counter()
    latents = call(steps)
    total = time.perf_counter() - start
    seconds = [end - begin for begin, end in zip([start, *ends], ends)]
    finite = bool(latents.isfinite().all())
    return {"seconds": seconds, "total": total, "bytes": {}, "difference": difference, "finite": finite}
