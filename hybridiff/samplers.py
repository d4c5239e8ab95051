"""Samplers with the update rule in plain sight: DDIM, Euler, DPM++ 2M for noise predictions, Euler, DPM++ 2M for velocities.

All have the same face: `timesteps` (what the network is told at each step, fp32), `scale_noise` (unit noise -> first latents),
`scale_input` and `step`, which is given latents and prediction of the step before too (None at the first). Latents stay in fp32. Schedules: scaled-linear betas of Stable Diffusion (1000 steps, leading
spacing, offset 1) and the twice-shifted sigmas of SD3, as in the scheduler configs of the official folders.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hybridiff.errors import UsageError

Previous = tuple[Tensor, Tensor] | None  # latents and prediction of the step before

TRAINING_STEPS = 1000


def alphas_cumprod() -> Tensor:
    """Cumulative product of 1 - beta, fp32 [1000], betas = linspace(sqrt 0.00085, sqrt 0.012)^2 ("scaled linear")."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TRAINING_STEPS, dtype=torch.float32) ** 2
    return (1.0 - betas).cumprod(0)


def leading_timesteps(steps: int) -> Tensor:
    """Integer training steps [steps], noisiest first: multiples of 1000 // steps, plus the official offset of 1."""
    return (torch.arange(steps) * (TRAINING_STEPS // steps)).flip(0) + 1


class Sampler:
    """What all samplers have; this one scales nothing."""

    timesteps: Tensor  # (steps,), what the network is told at each step, fp32

    def scale_noise(self, noise: Tensor) -> Tensor:
        """Unit noise -> the first latents."""
        return noise

    def scale_input(self, latents: Tensor, i: int) -> Tensor:
        """Latents of step i -> what the network is given."""
        return latents

    def step(self, latents: Tensor, predicted: Tensor, i: int, previous: Previous = None) -> Tensor:
        """Latents of step i and its prediction, with those of the step before -> latents of step i + 1."""
        raise NotImplementedError


class DDIM(Sampler):
    """Deterministic DDIM (Song et al. 2020, Eq. 12 with eta = 0): predict the clean latents, then noise them less."""

    def __init__(self, steps: int):
        timesteps, alphas = leading_timesteps(steps), alphas_cumprod()
        previous = timesteps - TRAINING_STEPS // steps
        self.alphas = alphas[timesteps]
        self.next_alphas = torch.where(previous >= 0, alphas[previous.clamp(min=0)], alphas[0])
        self.timesteps = timesteps.float()

    def step(self, latents: Tensor, noise: Tensor, i: int, previous: Previous = None) -> Tensor:
        """Latents of step i and the predicted noise -> latents of step i + 1."""
        a, a_next = self.alphas[i], self.next_alphas[i]
        clean = (latents - (1 - a).sqrt() * noise) / a.sqrt()
        return a_next.sqrt() * clean + (1 - a_next).sqrt() * noise


class Euler(Sampler):
    """Euler steps of the probability-flow ODE (Karras et al. 2022, Algorithm 2 without churn), sigmas from the betas."""

    def __init__(self, steps: int):
        timesteps, alphas = leading_timesteps(steps), alphas_cumprod().double()
        sigmas = ((1 - alphas) / alphas).sqrt()[timesteps]
        self.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)]).float()
        self.timesteps = timesteps.float()

    def scale_noise(self, noise: Tensor) -> Tensor:
        return noise * (self.sigmas[0] ** 2 + 1).sqrt()

    def scale_input(self, latents: Tensor, i: int) -> Tensor:
        return latents / (self.sigmas[i] ** 2 + 1).sqrt()

    def step(self, latents: Tensor, noise: Tensor, i: int, previous: Previous = None) -> Tensor:
        """Latents of step i and the predicted noise -> latents of step i + 1."""
        return latents + (self.sigmas[i + 1] - self.sigmas[i]) * noise


class FlowEuler(Sampler):
    """Euler steps of a rectified flow (Esser et al. 2024): latents = (1 - sigma) * image + sigma * noise."""

    def __init__(self, steps: int, shift: float = 3.0):
        def shifted(t: Tensor) -> Tensor:
            return shift * t / (1 + (shift - 1) * t)

        # the grid runs down to an already shifted smallest sigma and is then shifted again (official behaviour)
        smallest = shifted(torch.tensor(1 / TRAINING_STEPS, dtype=torch.float64)).item()
        sigmas = shifted(torch.linspace(1.0, smallest, steps, dtype=torch.float64))
        self.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)]).float()
        self.timesteps = self.sigmas[:-1] * TRAINING_STEPS

    def step(self, latents: Tensor, velocity: Tensor, i: int, previous: Previous = None) -> Tensor:
        """Latents of step i and the predicted velocity (noise - image) -> latents of step i + 1."""
        return latents + (self.sigmas[i + 1] - self.sigmas[i]) * velocity


def second_order(
    latents: Tensor, clean: Tensor, older: Tensor | None, alphas: Tensor, sigmas: Tensor, i: int
) -> Tensor:
    """A step of DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, Algorithm 2) from the clean latents predicted now and before.

    Noisy latents are alpha * clean + sigma * noise; lambda = log(alpha / sigma). The first and the last step are of first order.
    """
    ratio = sigmas[i + 1] / sigmas[i]
    if older is not None and i + 2 < len(sigmas):
        before, now, after = (alphas[i - 1 : i + 2].double() / sigmas[i - 1 : i + 2].double()).log().tolist()
        weight = (after - now) / (now - before) / 2
        clean = clean + weight * (clean - older)
    return ratio * latents + (alphas[i + 1] - ratio * alphas[i]) * clean


class DPM(Sampler):
    """DPM-Solver++(2M) for noise predictions, on DDIM's timesteps, down to no noise at all."""

    def __init__(self, steps: int):
        timesteps, signal = leading_timesteps(steps), alphas_cumprod().double()
        signal = torch.cat([signal[timesteps], signal.new_ones(1)])
        self.alphas, self.sigmas = signal.sqrt().float(), (1 - signal).sqrt().float()
        self.timesteps = timesteps.float()

    def clean(self, latents: Tensor, noise: Tensor, i: int) -> Tensor:
        return (latents - self.sigmas[i] * noise) / self.alphas[i]

    def step(self, latents: Tensor, noise: Tensor, i: int, previous: Previous = None) -> Tensor:
        """Latents of step i and the predicted noise -> latents of step i + 1."""
        older = self.clean(*previous, i - 1) if previous else None
        return second_order(latents, self.clean(latents, noise, i), older, self.alphas, self.sigmas, i)


class FlowDPM(FlowEuler):
    """DPM-Solver++(2M) for velocities, on the sigmas of FlowEuler: alpha = 1 - sigma."""

    def clean(self, latents: Tensor, velocity: Tensor, i: int) -> Tensor:
        return latents - self.sigmas[i] * velocity

    def step(self, latents: Tensor, velocity: Tensor, i: int, previous: Previous = None) -> Tensor:
        """Latents of step i and the predicted velocity (noise - image) -> latents of step i + 1."""
        older = self.clean(*previous, i - 1) if previous else None
        return second_order(latents, self.clean(latents, velocity, i), older, 1 - self.sigmas, self.sigmas, i)


SAMPLERS: dict[str, dict[str, Callable[..., Sampler]]] = {  # by what the network predicts, the default first
    "epsilon": {"ddim": DDIM, "euler": Euler, "dpmpp_2m": DPM},
    "flow": {"flow": FlowEuler, "dpmpp_2m": FlowDPM},
}


def make_sampler(prediction: str, name: str | None, steps: int, shift: float = 3.0) -> Sampler:
    """The sampler of that name for a network that predicts "epsilon" or "flow" (a velocity), the default where the name is None.

    `shift` concerns the flow samplers alone. UsageError where name or number of steps does not fit.
    """
    choices = SAMPLERS[prediction]
    name = name or next(iter(choices))
    if name not in choices:
        raise UsageError(
            f"`sampler` {name} does not fit a checkpoint of this kind: choose one of {', '.join(choices)}."
        )
    if not 1 <= steps < TRAINING_STEPS:
        raise UsageError(f"`steps` {steps} is out of range: give a number from 1 to {TRAINING_STEPS - 1}.")
    return choices[name](steps, shift) if prediction == "flow" else choices[name](steps)
