"""Classifier-free guidance, and how far the two predictions lie apart."""

from torch import Tensor


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022): uncond + scale * (cond - uncond), all of one shape.

    A scale of 1 or less means none: `cond` alone, whatever the scale, as in diffusers' pipelines.
    """
    if scale <= 1:
        return cond
    return uncond + scale * (cond - uncond)


def discrepancy(cond: Tensor, uncond: Tensor) -> Tensor:
    """Denoising discrepancy M (paper, Eq. 1): mean|cond - uncond| / mean|uncond|, a scalar in fp32.

    For flow matching the velocities take the place of the noise predictions. The released code adds 1e-12 below.
    """
    cond, uncond = cond.float(), uncond.float()
    return (cond - uncond).abs().mean() / (uncond.abs().mean() + 1e-12)
