"""KL autoencoder of Stable Diffusion: images <-> latents at an eighth of the side.

Follows Stability-AI/generative-models, sgm/modules/diffusionmodules/model.py; parameter names are those of the official
single file after `first_stage_model.`. SDXL and SD 1.5 have four latent channels and two 1x1 "quant" convolutions, SD3
has sixteen channels and no such convolutions.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from models.names import Rule, copy, identity, official, one_of
from models.sizes import Shapes, at_least_one, divide, groups, how_many, number, size


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of a KL autoencoder; the defaults are SDXL's."""

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)  # channels of a level = channels * multiplier
    blocks: int = 2  # residual blocks a level on the way down, one more on the way up
    latent_channels: int = 4
    quant_convs: bool = True
    groups: int = 32
    scaling: float = 0.13025  # the denoiser sees (latents - shift) * scaling
    shift: float = 0.0

    @property
    def factor(self) -> int:
        """Pixels per latent along a side."""
        return 2 ** (len(self.multipliers) - 1)

    @classmethod
    def from_shapes(
        cls, shapes: Shapes, given: Mapping[str, Any] = MappingProxyType({})
    ) -> "AutoencoderConfig":
        """Sizes from official names and shapes; `given` may have scaling, shift, groups. ValueError where they make up no autoencoder."""
        channels = size(shapes, "encoder.conv_in.weight", 0, 4)
        levels = at_least_one(how_many(shapes, r"encoder\.down\.(\d+)\."), "levels in the encoder")
        widths = [size(shapes, f"encoder.down.{level}.block.0.conv1.weight", 0, 4) for level in range(levels)]
        scaling = number(given, "scaling", cls.scaling, float)
        if scaling == 0:
            raise ValueError("the configuration gives scaling = 0")
        return cls(
            channels=channels,
            multipliers=tuple(divide(width, channels, "channels of a level") for width in widths),
            blocks=at_least_one(
                how_many(shapes, r"encoder\.down\.0\.block\.(\d+)\."), "residual blocks in the encoder"
            ),
            latent_channels=size(shapes, "decoder.conv_in.weight", 1, 4),
            quant_convs="post_quant_conv.weight" in shapes,
            groups=groups(given, channels),
            scaling=scaling,
            shift=number(given, "shift", cls.shift, float),
        )


ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
                 "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}  # fmt: skip


def hugging_face(keys: Collection[str]) -> list[Rule]:
    """Hugging Face autoencoder: the decoder's levels counted from the other end, Linear attention layers."""
    last = how_many(keys, r"decoder\.up_blocks\.(\d+)\.") - 1
    layer = r"((?:norm1|conv1|norm2|conv2|conv_shortcut)\.(?:weight|bias))"

    def resnet(place: str, rest: str) -> list[tuple[str, str]]:
        return copy(f"{place}.{rest.replace('conv_shortcut', 'nin_shortcut')}")

    def attention(half: str, name: str, kind: str) -> list[tuple[str, str]]:
        how = "conv" if kind == "weight" and name != "group_norm" else "copy"
        return [(f"{half}.mid.attn_1.{ATTENTION[name]}.{kind}", how)]

    return [
        identity(r"(?:post_)?quant_conv\.|(?:encoder|decoder)\.conv_(?:in|out)\."),
        (r"(encoder|decoder)\.conv_norm_out\.(\w+)", lambda half, kind: copy(f"{half}.norm_out.{kind}")),
        (rf"(encoder|decoder)\.mid_block\.resnets\.([01])\.{layer}",
         lambda half, i, rest: resnet(f"{half}.mid.block_{int(i) + 1}", rest)),
        (rf"(encoder|decoder)\.mid_block\.attentions\.0\.({one_of(ATTENTION)})\.(weight|bias)",
         attention),
        (rf"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.{layer}",
         lambda level, i, rest: resnet(f"encoder.down.{level}.block.{i}", rest)),
        (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.(.+)",
         lambda level, rest: copy(f"encoder.down.{level}.downsample.{rest}")),
        (rf"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.{layer}",
         lambda level, i, rest: resnet(f"decoder.up.{last - int(level)}.block.{i}", rest)),
        (r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.(.+)",
         lambda level, rest: copy(f"decoder.up.{last - int(level)}.upsample.{rest}")),
    ]  # fmt: skip


def norm(channels: int, groups: int) -> nn.GroupNorm:
    """Group normalisation with the autoencoder's epsilon."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after GroupNorm and SiLU, plus the input. (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions, plus the input. (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # (B, C, H, W) -> (B, 1, H*W, C): one head as wide as the block; contiguous, or the CPU makes the (HW)^2 matrix
        q, k, v = (conv(h).flatten(2).mT.unsqueeze(1).contiguous() for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        h = h.squeeze(1).transpose(1, 2).reshape(x.shape)  # (B, 1, H*W, C) -> (B, C, H, W)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halve the side: pad one row and column at the bottom and right, then a 3x3 convolution of stride 2.

    (B, C, H, W) -> (B, C, H/2, W/2), rounded down.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the side: nearest neighbour, then a 3x3 convolution. (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def middle(channels: int, groups: int) -> nn.ModuleDict:
    """The part at the lowest resolution, the same in encoder and decoder."""
    return nn.ModuleDict(
        {
            "block_1": ResidualBlock(channels, channels, groups),
            "attn_1": AttentionBlock(channels, groups),
            "block_2": ResidualBlock(channels, channels, groups),
        }
    )


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> mean and log-variance, stacked (B, 2 * latent_channels, H/8, W/8)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        before = config.channels
        for level, width in enumerate(widths):
            stage = nn.Module()
            stage.block = nn.ModuleList(
                ResidualBlock(before if i == 0 else width, width, config.groups) for i in range(config.blocks)
            )
            if level < len(widths) - 1:
                stage.downsample = Downsample(width)
            self.down.append(stage)
            before = width
        self.mid = middle(before, config.groups)
        self.norm_out = norm(before, config.groups)
        self.conv_out = nn.Conv2d(before, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for stage in self.down:
            for block in stage.block:
                h = block(h)
            if hasattr(stage, "downsample"):
                h = stage.downsample(h)
        for block in self.mid.values():
            h = block(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latents (B, latent_channels, H/8, W/8) -> images (B, 3, H, W)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        before = widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, before, 3, padding=1)
        self.mid = middle(before, config.groups)
        stages = []  # built from the deepest level up, stored in the order of the encoder's levels
        for level, width in reversed(list(enumerate(widths))):
            stage = nn.Module()
            stage.block = nn.ModuleList(
                ResidualBlock(before if i == 0 else width, width, config.groups)
                for i in range(config.blocks + 1)
            )
            if level > 0:
                stage.upsample = Upsample(width)
            stages.insert(0, stage)
            before = width
        self.up = nn.ModuleList(stages)
        self.norm_out = norm(before, config.groups)
        self.conv_out = nn.Conv2d(before, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        for block in self.mid.values():
            h = block(h)
        for stage in reversed(self.up):
            for block in stage.block:
                h = block(h)
            if hasattr(stage, "upsample"):
                h = stage.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Autoencoder(nn.Module):
    """Both halves; sampling needs the decoder alone. Images lie in [-1, 1]."""

    Config, title = AutoencoderConfig, "autoencoder"
    namings = (("decoder.up.", official), ("decoder.up_blocks.", hugging_face))
    surplus = r"(?:loss|model_ema)\..*"  # of its training
    # of a Hugging Face config.json
    json_fields = {"norm_num_groups": "groups", "scaling_factor": "scaling", "shift_factor": "shift"}
    only_encoding = ("encoder", "quant_conv")  # modules that sampling does not need

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.quant_convs:
            self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
            self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> mean and log-variance (clamped to [-30, 20]) of the raw latents."""
        moments = self.encoder(images)
        if self.config.quant_convs:
            moments = self.quant_conv(moments)
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def decode(self, latents: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) -> images (B, 3, 8h, 8w), about [-1, 1], not clamped.

        SDXL's decoder overflows in fp16, so decode in fp32.
        """
        if self.config.quant_convs:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)

    def unscale(self, latents: Tensor) -> Tensor:
        """What the denoiser sees -> raw latents."""
        return latents / self.config.scaling + self.config.shift
