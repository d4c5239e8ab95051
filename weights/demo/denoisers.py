"""The two demo denoisers: sizes, conditioning, losses and a plain sampler for the samples.

Besides the noise or the velocity, training asks the network's middle features what stands where in the scene, and demo-sd3's
where its outlines run (a linear layer that is thrown away afterwards). As with representation alignment (Yu et al. 2024, arXiv
2410.06940) the network then learns much sooner which word belongs to which place; here the scene itself is known, so no second
network is needed.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import LongTensor, Tensor, nn

from models.embeddings import sinusoid
from models.mmdit import MMDiT, MMDiTConditioning, MMDiTConfig
from models.unet import UNet, UNetConditioning, UNetConfig
from weights.demo.scenes import COLOURS, REACH, SHAPES, Scene
from weights.demo.text_encoders import TextEncoders

SIDE = 128
READING = {
    "sdxl": (0.1, 0.0),
    "sd3": (0.25, 1.0),
}  # weights in the loss: what stands where, where outlines run (does nothing for SDXL)
PARTS = 4  # a side of a cell, for the outlines
UNET = {
    "channels": 48,
    "multipliers": (1, 2, 3),
    "blocks": 2,
    "depths": (0, 1, 1),
    "middle_depth": 1,
    "context_width": 256,
    "vector_width": 128 + 6 * 256,
    "heads": (1, 2, 3),
    "groups": 16,
}
MMDIT = {"width": 192, "depth": 6, "heads": 3, "context_width": 256, "pooled_width": 256, "qk_norm": True}
GRID = 64  # side of the stored grid of positions, in latents


class Reading(nn.Module):
    """A denoiser that also reads the scene from its middle features: what crosses position `at`, cells x cells."""

    def __init__(self, denoiser: UNet | MMDiT, at: int, width: int, cells: int):
        super().__init__()
        self.denoiser, self.at, self.cells = denoiser, at, cells
        self.reader = nn.Linear(width, 1 + len(SHAPES) + len(COLOURS) + PARTS**2)

    def forward(
        self, x: Tensor, t: Tensor, conditioning: UNetConditioning | MMDiTConditioning
    ) -> tuple[Tensor, Tensor]:
        """-> the denoiser's prediction and logits [B, cells^2, shapes + colours + parts of a cell]."""
        net, step = self.denoiser, ({}, t, conditioning, x.shape[2:])
        middle = net.run((0, self.at), x, *step)  # U-Net (B, C, cells, cells), MMDiT (B, cells^2, C) and text
        states = middle.flatten(2).transpose(1, 2) if isinstance(middle, Tensor) else middle[0]
        read = self.reader(F.layer_norm(states, states.shape[-1:]))
        return net.run((self.at, net.units), middle, *step), read


def cells(scene: Scene, side: int) -> Tensor:
    """What each cell of a grid belongs to, row by row: [2, side * side], shape (0 = background) and colour."""
    labels = torch.tensor([0, [*COLOURS].index(scene.background)])[:, None].repeat(1, side * side)
    for item in scene.objects:
        reach = REACH * item.radius + 0.25 / side
        for cell in range(side * side):
            y, x = ((place + 0.5) / side for place in divmod(cell, side))
            if max(abs(x - item.x), abs(y - item.y)) < reach:
                labels[:, cell] = torch.tensor([1 + SHAPES.index(item.shape), [*COLOURS].index(item.colour)])
    return labels


def reading_error(read: Tensor, scenes: Tensor, covered: Tensor, weights: tuple[float, float]) -> Tensor:
    """What `Reading` gives, compared with what stands where and with the share of every part of a cell that is covered.

    read: logits [B, side^2, shapes + colours + parts]; scenes: labels [B, 2, side^2] (`cells`); covered: in [0, 1], [B, 64, 64];
    weights: of both comparisons, see READING.
    """
    shapes, colours, parts = (
        part.flatten(0, 1) for part in read.float().split([1 + len(SHAPES), len(COLOURS), PARTS**2], dim=2)
    )
    standing = F.cross_entropy(shapes, scenes[:, 0].flatten()) + F.cross_entropy(
        colours, scenes[:, 1].flatten()
    )
    shares = F.adaptive_avg_pool2d(covered, PARTS * math.isqrt(read.shape[1]))
    shares = rearrange(shares, "b (y down) (x across) -> (b y x) (down across)", down=PARTS, across=PARTS)
    return weights[0] * standing + weights[1] * F.binary_cross_entropy_with_logits(parts, shares)


class SDXLDemo(nn.Module):
    """U-Net with two text encoders; predicts the noise (Ho et al. 2020)."""

    latent_channels = 4

    def __init__(self, encoders: TextEncoders):
        super().__init__()
        self.encoders = encoders
        self.denoiser = UNet(UNetConfig(**UNET))
        at = self.denoiser.units - 6  # on the way up
        self.reading = Reading(self.denoiser, at, 3 * UNET["channels"], cells=8)
        for name, weight in self.denoiser.named_parameters():
            if any(part in name for part in ("out_layers.3.", "proj_out.", "out.2.")):
                nn.init.zeros_(weight)
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # scaled linear
        self.signal = torch.cumprod(1 - betas, dim=0).float()  # alpha-bar

    def condition(self, ids: LongTensor, keep: Tensor) -> UNetConditioning:
        """ids [B, 3, LENGTH]; rows with keep [B] False get zeros, SDXL's rule for "no negative prompt"."""
        (text_l, text_g, _), (_, pooled) = self.encoders(ids)
        text = torch.cat([text_l, text_g], dim=2) * keep[:, None, None]  # [B, LENGTH, 256]
        sizes = sinusoid(torch.tensor([SIDE, SIDE, 0, 0, SIDE, SIDE], device=ids.device), 256).flatten()
        vector = torch.cat([pooled * keep[:, None], sizes.expand(len(ids), -1)], dim=1)
        return UNetConditioning(text=text, vector=vector)

    def loss(
        self,
        predict: Callable,
        latents: Tensor,
        ids: LongTensor,
        scenes: LongTensor,
        covered: Tensor,
        empty: LongTensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Squared error of the noise with min-SNR weights, gamma 5 (Hang et al. 2023); 10% without caption.

        Noisy steps (SNR below 1) weigh SNR^-0.5 more: there the noise is easy to predict, and without that the text
        hardly gets to choose the background.
        """
        count = len(latents)
        keep = (torch.rand(count, generator=generator) >= 0.1).float().to(latents.device)
        t = torch.randint(1000, (count,), generator=generator)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        a = self.signal[t].to(latents.device)
        noisy = a.sqrt()[:, None, None, None] * latents + (1 - a).sqrt()[:, None, None, None] * noise
        predicted, read = predict(noisy, t.to(latents.device).float(), self.condition(ids, keep))
        snr = a / (1 - a)
        error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        weight = snr.clamp(max=5) / snr * snr.clamp(max=1) ** -0.5
        return (error * weight).mean() + reading_error(read, scenes, covered, READING["sdxl"])

    @torch.no_grad()
    def sample(
        self, ids: LongTensor, empty: LongTensor, noise: Tensor, steps: int, guidance: float
    ) -> Tensor:
        """DDIM, leading spacing with offset 1, both branches in one batch: [B, 4, h, w]."""
        count = len(noise)
        keep = torch.cat([torch.zeros(count), torch.ones(count)]).to(noise.device)
        conditioning = self.condition(ids.repeat(2, 1, 1), keep)
        x, stride = noise, 1000 // steps
        for t in range((steps - 1) * stride + 1, 0, -stride):
            a, a_next = self.signal[t], self.signal[max(t - stride, 0)]
            without, with_text = self.denoiser(
                x.repeat(2, 1, 1, 1), torch.full((2 * count,), float(t)).to(x), conditioning
            ).chunk(2)
            eps = without + guidance * (with_text - without)
            image = (x - (1 - a).sqrt() * eps) / a.sqrt()
            x = a_next.sqrt() * image + (1 - a_next).sqrt() * eps
        return x


class SD3Demo(nn.Module):
    """MMDiT with three text encoders; predicts the velocity of a rectified flow (Esser et al. 2024).

    It learns what stands where with patches of 2 x 2 latents as in SD3, at a third of the cost, and then to draw it with
    single latents: small stars need more than the 8 x 8 tokens that these small pictures would have.
    """

    latent_channels = 16

    def __init__(self, encoders: TextEncoders, patch: int = 2):
        super().__init__()
        self.encoders = encoders
        self.denoiser = MMDiT(MMDiTConfig(**MMDIT, patch=patch, positions=GRID // patch))
        self.reading = Reading(self.denoiser, MMDIT["depth"] // 2, MMDIT["width"], cells=SIDE // 8 // patch)
        initialise_mmdit(self.denoiser)

    def refined(self) -> "SD3Demo":
        """A model with patches of one latent that begins where this one, with patches of 2, stands.

        What reads a patch reads a single latent as four equal ones; what writes a patch writes the mean of the four.
        """
        fine = SD3Demo(self.encoders, patch=1)
        state = self.state_dict()
        del state["denoiser.pos_embed"], state["reading.denoiser.pos_embed"]
        for prefix in ("denoiser.", "reading.denoiser."):
            reads, writes = f"{prefix}x_embedder.proj.weight", f"{prefix}final_layer.linear."
            state[reads] = state[reads].sum(
                dim=(2, 3), keepdim=True
            )  # [width, 16, 2, 2] -> [width, 16, 1, 1]
            for name in (writes + "weight", writes + "bias"):
                state[name] = state[name].unflatten(0, (4, 16)).mean(dim=0)  # [2 * 2 * 16, ...] -> [16, ...]
        fine.load_state_dict(state, strict=False)
        return fine

    def condition(self, ids: LongTensor, keep_t5: Tensor) -> MMDiTConditioning:
        """ids [B, 3, LENGTH]; rows with keep_t5 [B] False get zeros for T5, SD3's rule for "no T5"."""
        (text_l, text_g, text_t5), (pooled_l, pooled_g) = self.encoders(ids)
        clip = torch.cat([text_l, text_g], dim=2)  # [B, LENGTH, 256], already as wide as T5
        text = torch.cat([clip, text_t5 * keep_t5[:, None, None]], dim=1)  # [B, 2 LENGTH, 256]
        return MMDiTConditioning(text=text, pooled=torch.cat([pooled_l, pooled_g], dim=1))

    def loss(
        self,
        predict: Callable,
        latents: Tensor,
        ids: LongTensor,
        scenes: LongTensor,
        covered: Tensor,
        empty: LongTensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Squared error of the velocity; the logits of the times are normal with mean 1.1 and deviation 1.2.

        That is SD3's logit-normal rule with the sampler's shift of 3 towards noise (log 3 = 1.1), and a little wider. 10% go with
        the caption `empty` [1, 3, LENGTH], SD3's rule for "no negative prompt", and 7% without T5.
        """
        count = len(latents)
        drop = (torch.rand(count, generator=generator) < 0.1).to(ids.device)
        ids = torch.where(drop[:, None, None], empty, ids)
        keep_t5 = (torch.rand(count, generator=generator) >= 0.07).float().to(latents.device)
        s = torch.sigmoid(1.1 + 1.2 * torch.randn(count, generator=generator)).to(latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        noisy = (1 - s)[:, None, None, None] * latents + s[:, None, None, None] * noise
        predicted, read = predict(noisy, 1000 * s, self.condition(ids, keep_t5))
        return (predicted.float() - (noise - latents)).square().mean() + reading_error(
            read, scenes, covered, READING["sd3"]
        )

    @torch.no_grad()
    def sample(
        self, ids: LongTensor, empty: LongTensor, noise: Tensor, steps: int, guidance: float
    ) -> Tensor:
        """Euler along the flow with shift 3, both branches in one batch: [B, 16, h, w]."""
        count = len(noise)
        both = torch.cat([empty.expand_as(ids), ids])
        conditioning = self.condition(both, torch.ones(2 * count).to(noise.device))
        t = torch.linspace(1, 0, steps + 1)
        sigmas = (3 * t / (1 + 2 * t)).tolist()
        x = noise
        for s, s_next in zip(sigmas, sigmas[1:]):
            without, with_text = self.denoiser(
                x.repeat(2, 1, 1, 1), torch.full((2 * count,), 1000 * s).to(x), conditioning
            ).chunk(2)
            x = x + (s_next - s) * (without + guidance * (with_text - without))
        return x


def initialise_mmdit(model: MMDiT) -> None:
    """As DiT (Peebles and Xie 2023): Xavier for linear layers, zeros for modulations and output, fixed sin-cos grid."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if "adaLN_modulation" in name or name == "final_layer.linear":
                nn.init.zeros_(module.weight)
            elif name.startswith("t_embedder"):
                nn.init.normal_(module.weight, std=0.02)
    nn.init.xavier_uniform_(model.x_embedder.proj.weight.view(len(model.x_embedder.proj.weight), -1))
    nn.init.zeros_(model.x_embedder.proj.bias)
    patch, side, width = model.config.patch, model.config.positions, MMDIT["width"]
    places = (torch.arange(side) + 0.5) * patch / 2 - (
        GRID + 2
    ) / 4  # in steps of two latents, 0 near the middle
    angles = places[:, None] * 100.0 ** (
        -torch.arange(width // 4) / (width // 4)
    )  # short periods: few patches
    axis = torch.cat([angles.cos(), angles.sin()], dim=1)  # [side, width / 2]
    rows, columns = axis[:, None].expand(side, side, -1), axis[None].expand(side, side, -1)
    model.pos_embed.data.copy_(torch.cat([rows, columns], dim=2).reshape(1, side * side, width))


FAMILIES = {"sdxl": SDXLDemo, "sd3": SD3Demo}
