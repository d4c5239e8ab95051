"""Sinusoidal embeddings shared by the denoisers."""

import math

import torch
from torch import Tensor


def sinusoid(values: Tensor, width: int) -> Tensor:
    """Values (...) -> (..., width) in fp32: cosines first, then sines, of periods from 2 pi up to nearly 2 pi * 10000.

    Source: `timestep_embedding` in Stability-AI/generative-models, sgm/modules/diffusionmodules/util.py; in diffusers
    flip_sin_to_cos=True, downscale_freq_shift=0. The code of Ho et al. 2020 has sines first and divides by half - 1.
    """
    half = width // 2
    frequencies = torch.exp(
        -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=values.device) / half
    )
    angles = values.float()[..., None] * frequencies  # (..., half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
