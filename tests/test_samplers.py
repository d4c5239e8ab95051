"""Samplers against the diffusers schedulers: timesteps, sigmas and trajectories `close` to 1e-5."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from hybridiff.errors import UsageError
from hybridiff.samplers import DDIM, Euler, FlowEuler, make_sampler

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1)


def pair(name: str, steps: int):
    """Our sampler and the original one, set to so many steps."""
    if name == "ddim":
        original, ours = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False), DDIM(steps)
    elif name == "euler":
        original, ours = EulerDiscreteScheduler(**BETAS), Euler(steps)
    else:
        original, ours = FlowMatchEulerDiscreteScheduler(shift=3.0), FlowEuler(steps, shift=3.0)
    original.set_timesteps(steps)
    return ours, original


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("steps", [1, 2, 7, 28, 50, 100])
@pytest.mark.parametrize("name", ["ddim", "euler", "flow"])
def test_schedule_and_trajectory(name, steps):
    """A stand-in for the network that depends on latents and time, over the whole run."""
    ours, original = pair(name, steps)
    assert relative(ours.timesteps, original.timesteps.float()) <= 1e-5
    if name != "ddim":
        assert relative(ours.sigmas, original.sigmas) <= 1e-5
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(steps))
    a, b = ours.start(noise), noise * getattr(original, "init_noise_sigma", 1.0)
    assert relative(a, b) <= 1e-6
    for i, t in enumerate(original.timesteps):
        x = ours.network_input(a, i)
        y = original.scale_model_input(b, t) if name != "flow" else b
        assert relative(x, y) <= 1e-5
        a = ours.step(a, torch.tanh(x + t / 1000), i)
        b = original.step(torch.tanh(y + t / 1000), t, b, return_dict=False)[0]
        assert relative(a, b) <= 1e-5


def test_refusals():
    for family, name, steps in (("sdxl", "flow", 50), ("sd3", "ddim", 50), ("sdxl", None, 0), ("sd3", None, 1000)):
        with pytest.raises(UsageError):
            make_sampler(family, name, steps)
