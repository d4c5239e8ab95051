"""Stage two of the demo training: an 8x autoencoder for the scenes, the latents that the denoiser learns from, and what is covered in them."""

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from models.autoencoder import Autoencoder, AutoencoderConfig
from weights.demo.loop import Plan, Run, read_safetensors, write_safetensors
from weights.demo.scenes import render, sample

SIDE = 128
CROP = 64  # most steps see a quarter of the picture, the last 15% all of it
PLAN = Plan(
    steps=6000, batch=8, rate=1.5e-3, warmup=200, ema=0.998, bf16=False
)  # bf16 begins slowly from some first weights
PLANS = {
    "sdxl": replace(PLAN, steps=9000),
    "sd3": PLAN,
}  # 6,000 steps came to 33.5 dB once with 4 channels, and to 34.6 with 16


class Weights(NamedTuple):
    """Of the terms that shape the latents, and whether every second step compares halved ones."""

    kl: float  # KL of the posterior to a unit normal, a latent number: noise that teaches the decoder to forgive
    fast: float = 0.0  # mean square of what differs from the mean of its 2 x 2 latents
    halved: bool = False


WEIGHTS = {
    "sdxl": Weights(3e-4),
    "sd3": Weights(5e-3, 0.05, halved=True),
}  # 16 channels have room for fast changes, 4 have not
LATENTS = 24576  # scenes whose latents are kept
CONFIGS = {
    "sdxl": AutoencoderConfig(channels=16, multipliers=(1, 2, 4, 4), blocks=1, latent_channels=4, groups=8),
    "sd3": AutoencoderConfig(
        channels=16, multipliers=(1, 2, 4, 4), blocks=1, latent_channels=16, quant_convs=False, groups=8
    ),
}


def initialise(model: Autoencoder) -> None:
    """Starts every residual branch at zero and the posterior at a standard deviation of 0.2."""
    for name, weight in model.named_parameters():
        if any(part in name for part in ("conv2.", "attn_1.proj_out.")):
            nn.init.zeros_(weight)
    last = model.quant_conv if model.config.quant_convs else model.encoder.conv_out
    nn.init.constant_(last.bias[model.config.latent_channels :], -3.2)


def edges(images: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels along both axes."""
    return images.diff(dim=-1), images.diff(dim=-2)


def autoencoder_loss(
    model: Autoencoder, images: Tensor, noise: Tensor, weights: Weights, halved: bool
) -> Tensor:
    """L1 + L2 + L1 of the edges + the weighted KL and fast changes; images [B, 3, H, W].

    With `halved` the latents and the pictures are halved in size before they are compared, so that what stands where goes into the
    slow changes of the latents, which a denoiser learns sooner (Kouzelis et al. 2025, arXiv 2502.09509).
    """
    mean, log_variance = model.encode(images)
    log_variance = log_variance.clamp(-30, 20)
    latents = mean + noise * torch.exp(0.5 * log_variance)
    if halved:
        latents, images = F.avg_pool2d(latents, 2), F.avg_pool2d(images, 2)
    error = model.decode(latents) - images
    edge = sum(difference.abs().mean() for difference in edges(error))
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    fast = (mean - F.interpolate(F.avg_pool2d(mean, 2), scale_factor=2.0)).square().mean()
    return error.abs().mean() + error.square().mean() + edge + weights.kl * kl + weights.fast * fast


def picture_batch(generator: torch.Generator, count: int, crop: int) -> Tensor:
    """Random training scenes, cut to a random square: [count, 3, crop, crop]."""
    images = []
    for index in torch.randint(2**31, (count,), generator=generator).tolist():
        left, top = torch.randint(SIDE - crop + 1, (2,), generator=generator).tolist()
        images.append(render(sample("train", index)[0], SIDE)[:, top : top + crop, left : left + crop])
    return torch.stack(images)


@torch.no_grad()
def psnr(model: Autoencoder, count: int = 64) -> float:
    """PSNR in dB over unseen scenes, from the mean squared error of all of them."""
    images = torch.stack([render(sample("test", index)[0], SIDE) for index in range(count)])
    device = next(model.parameters()).device
    errors = [
        F.mse_loss(model.decode(model.encode(part.to(device))[0]).clamp(-1, 1), part.to(device)).item()
        for part in images.split(8)
    ]
    return 10 * math.log10(4 / (sum(errors) / len(errors)))


def save_sheet(images: Tensor, path: Path, columns: int = 8) -> None:
    """Writes images [N, 3, H, W] in [-1, 1] as one PNG, N a multiple of the columns."""
    count, _, height, width = images.shape
    grid = images.view(count // columns, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    grid = grid.reshape(count // columns * height, columns * width, 3)
    Image.fromarray(((grid.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()).save(path)


def train_autoencoder(
    family: str, out: Path, device: torch.device, steps: int | None
) -> tuple[Autoencoder, float]:
    """Trains (or resumes, or just loads) the family's autoencoder: (model with averaged weights, PSNR)."""
    torch.manual_seed(0)
    model = Autoencoder(CONFIGS[family])
    initialise(model)
    model.to(device)
    plan = replace(PLANS[family], steps=steps or PLANS[family].steps)
    run = Run(model, plan, out / f"{family}-vae.safetensors")

    def loss_of(generator: torch.Generator, step: int) -> Tensor:
        whole = step >= 0.85 * plan.steps
        images = picture_batch(generator, plan.batch // 2 if whole else plan.batch, SIDE if whole else CROP)
        latent_side = images.shape[-1] // 8
        noise = torch.randn(
            len(images), model.config.latent_channels, latent_side, latent_side, generator=generator
        )
        with run.half_precision():
            return autoencoder_loss(
                model,
                images.to(device),
                noise.to(device),
                WEIGHTS[family],
                WEIGHTS[family].halved and step % 2 == 1,
            )

    def show() -> None:
        images = torch.stack([render(sample("test", index)[0], SIDE) for index in range(8)])
        with torch.no_grad():
            decoded = model.decode(model.encode(images.to(device))[0]).cpu()
        save_sheet(torch.cat([images, decoded]), out / f"{family}-vae-{run.step:05d}.png")
        print(f"autoencoder PSNR {psnr(model):.2f} dB", flush=True)

    run.fit(loss_of, show, show_every=1000)
    run.use_average()
    return model.eval().requires_grad_(False), psnr(model)


def covered(images: Tensor) -> Tensor:
    """How many pixels of every 2 x 2 differ from the top left one, which is the background's: images [N, 3, S, S] -> uint8 [N, S/2, S/2]."""
    away = (images - images[:, :, :1, :1]).abs().amax(dim=1) > 0.02
    return F.avg_pool2d(away.float(), 2, divisor_override=1).to(torch.uint8)


@torch.no_grad()
def latent_cache(
    family: str, model: Autoencoder, out: Path, source: str
) -> tuple[dict[str, Tensor], float, float]:
    """Of the first training scenes "latents", fp16 [N, C, 16, 16], normalised, and "covered", uint8 [N, 64, 64]; the scaling and the shift.

    `source`: what the autoencoder comes from; a file of another one is made anew.
    """
    path = out / f"{family}-scenes.safetensors"
    tensors, metadata = read_safetensors(path) if path.exists() else ({}, {})
    if metadata.get("source") != source:
        device = next(model.parameters()).device
        encoded, counts = [], []
        for start in range(0, LATENTS, 32):
            images = torch.stack(
                [render(sample("train", index)[0], SIDE) for index in range(start, start + 32)]
            )
            encoded.append(model.encode(images.to(device))[0].cpu())
            counts.append(covered(images))
            if start % 4096 == 0:
                print(f"latents {start}/{LATENTS}", flush=True)
        raw = torch.cat(encoded)
        shift = 0.0 if family == "sdxl" else round(raw.mean().item(), 4)  # SDXL's rule has no shift
        scaling = round(1 / (raw - shift).square().mean().sqrt().item(), 5)
        tensors = {"latents": ((raw - shift) * scaling).half(), "covered": torch.cat(counts)}
        metadata = {"scaling": str(scaling), "shift": str(shift), "source": source}
        write_safetensors(tensors, path, metadata)
    return tensors, float(metadata["scaling"]), float(metadata["shift"])
