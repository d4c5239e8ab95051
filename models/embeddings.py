"""Sinusoidal embeddings shared by the denoisers."""

import math

import torch
from torch import Tensor


def sinusoid(values: Tensor, width: int) -> Tensor:
    """Values (...) -> (..., width) in fp32: cosines first, then sines, longest period 10000 (Ho et al. 2020).

    Source: `timestep_embedding` in Stability-AI/generative-models, sgm/modules/diffusionmodules/util.py.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angles = values.float()[..., None] * frequencies  # (..., half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
