"""Samplers against the diffusers schedulers: timesteps, sigmas and trajectories `close` to 1e-5."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from hybridiff.errors import UsageError
from hybridiff.samplers import DDIM, DPM, Euler, FlowDPM, FlowEuler, make_sampler

BETAS = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    timestep_spacing="leading",
    steps_offset=1,
)


def pair(name: str, steps: int):
    """Our sampler and the original one, set to so many steps."""
    if name == "ddim":
        original, ours = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False), DDIM(steps)
    elif name == "euler":
        original, ours = EulerDiscreteScheduler(**BETAS), Euler(steps)
    elif name == "dpm":
        original, ours = DPMSolverMultistepScheduler(**BETAS), DPM(steps)
        original.set_timesteps(timesteps=ours.timesteps.int().tolist())  # its own "leading" is not DDIM's
        return ours, original
    elif name == "flow-dpm":
        original = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        ours = FlowDPM(steps, shift=3.0)
        original.set_timesteps(steps)
        original.sigmas, original.timesteps = (
            ours.sigmas,
            ours.timesteps.double(),
        )  # SD3's, which are shifted twice
        original.lower_order_final = True
        return ours, original
    else:
        original, ours = FlowMatchEulerDiscreteScheduler(shift=3.0), FlowEuler(steps, shift=3.0)
    original.set_timesteps(steps)
    return ours, original


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("steps", [1, 2, 7, 28, 50, 100])
@pytest.mark.parametrize("name", ["ddim", "euler", "flow", "dpm", "flow-dpm"])
def test_schedule_and_trajectory(name, steps):
    """A stand-in for the network that depends on latents and time, over the whole run."""
    ours, original = pair(name, steps)
    assert relative(ours.timesteps, original.timesteps.float()) <= 1e-5
    if name in ("euler", "flow"):
        assert relative(ours.sigmas, original.sigmas) <= 1e-5
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(steps))
    a, b = ours.scale_noise(noise), noise * getattr(original, "init_noise_sigma", 1.0)
    assert relative(a, b) <= 1e-6
    last = None
    for i, t in enumerate(original.timesteps):
        x = ours.scale_input(a, i)
        y = original.scale_model_input(b, t) if "flow" not in name else b
        assert relative(x, y) <= 1e-5
        now = a, torch.tanh(x + t / 1000)
        a, last = ours.step(*now, i, last), now
        b = original.step(torch.tanh(y + t / 1000), t, b, return_dict=False)[0]
        assert relative(a, b) <= 1e-5


def test_refusals():
    for prediction, name, steps in (
        ("epsilon", "flow", 50),
        ("flow", "ddim", 50),
        ("epsilon", None, 0),
        ("flow", None, 1000),
    ):
        with pytest.raises(UsageError):
            make_sampler(prediction, name, steps)
