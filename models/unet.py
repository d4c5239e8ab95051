"""The U-Net of SDXL (SD 1.5 is another config of it), written so that it can be cut.

Follows Stability-AI/generative-models, sgm/modules/diffusionmodules/openaimodel.py and sgm/modules/attention.py; parameter
names are those of the official single file after `model.diffusion_model.`.

A *cut* is a depth d between 0 and n, the number of input blocks, both exclusive. `entry` runs input_blocks[:d]; `inner` runs
input_blocks[d:], the middle and output_blocks[:n-d]; `exit` runs output_blocks[n-d:] and the output layers. The skips made by
`entry` are read by `exit` alone, so exactly one tensor crosses in each direction. `forward` is exit(inner(entry)), whatever the
cut. Cuts nest: between an `outer` depth and a deeper one lies a ring, of which `down` runs the input blocks and `up` the output
blocks.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.embeddings import sinusoid


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a U-Net; the defaults are SDXL base 1.0."""

    in_channels: int = 4
    out_channels: int = 4
    channels: int = 320
    multipliers: tuple[int, ...] = (1, 2, 4)  # channels of a level = channels * multiplier
    blocks: int = 2  # residual blocks a level on the way down, one more on the way up
    depths: tuple[int, ...] = (0, 2, 10)  # transformer blocks after each residual block of a level
    middle_depth: int = 10
    heads: tuple[int, ...] = (5, 10, 20)  # attention heads at each level
    context_width: int = 2048
    vector_width: int | None = 2816  # pooled text and sizes; None where the network takes no vector (SD 1.5)
    groups: int = 32
    linear_projections: bool = (
        True  # Linear (SDXL) or 1x1 convolutions (SD 1.5) around the transformer blocks
    )

    @property
    def input_blocks(self) -> int:
        """n: the number of input blocks, and of output blocks."""
        return len(self.multipliers) * (self.blocks + 1)

    @property
    def segments(self) -> int:
        """Into how many segments it can be cut at most."""
        return self.input_blocks

    @property
    def shared_blocks(self) -> int:
        """How many blocks several devices can share: none."""
        return 0

    @property
    def multiple(self) -> int:
        """Height and width of the latents must be multiples of this: they may be any."""
        return 1


class UNetConditioning(NamedTuple):
    """What one branch tells the network about its text."""

    text: Tensor  # (B, L, context_width)
    vector: Tensor | None  # (B, vector_width): pooled text, then six size sinusoids


class Features(NamedTuple):
    """The one tensor that crosses the cut, in either direction."""

    hidden: Tensor  # (B, C, h, w)


class ResBlock(nn.Module):
    """Residual block that adds the embedding between its convolutions. x (B, C_in, h, w), emb (B, time_width) -> (B, C_out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, time_width: int, groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_width, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out_channels),
            nn.SiLU(),
            nn.Dropout(0.0),  # keeps the official index of the next layer
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class CrossAttention(nn.Module):
    """Multi-head attention of x (B, N, C) to context (B, L, context_width); self-attention where none is given."""

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        # (B, N, heads * d) -> (B, heads, N, d)
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))  # (B, heads, N, d) -> (B, N, C)


class GEGLU(nn.Module):
    """Gated linear unit: value * gelu(gate), both from one projection. (B, N, width) -> (B, N, inner)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU, then a projection back. (B, N, C) -> (B, N, C)."""

    def __init__(self, width: int):
        super().__init__()
        # the empty place keeps the official index of the last layer
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Dropout(0.0), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each after LayerNorm, each added.

    x (B, N, C), context (B, L, context_width) -> (B, N, C).
    """

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = CrossAttention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = CrossAttention(width, context_width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, plus the input. (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, width: int, depth: int, heads: int, context_width: int, groups: int, linear: bool):
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, context_width, heads) for _ in range(depth)
        )
        self.proj_out = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm(x)
        if not self.linear:
            h = self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, h*w, C)
        if self.linear:
            h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, context)
        if self.linear:
            h = self.proj_out(h)
        h = h.transpose(1, 2).reshape(x.shape)  # (B, h*w, C) -> (B, C, h, w)
        if not self.linear:
            h = self.proj_out(h)
        return x + h


class Downsample(nn.Module):
    """Halve the side, rounded up, by a 3x3 convolution of stride 2. (B, C, h, w) -> (B, C, ceil(h/2), ceil(w/2))."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Double the side by nearest neighbour, an odd side short of the last row or column; then a 3x3 convolution.

    (B, C, h, w) -> (B, C, *side), where side is (2h or 2h - 1, 2w or 2w - 1).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, side: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x, size=side, mode="nearest"))


class Block(nn.Sequential):
    """One entry of input_blocks, middle_block or output_blocks: hands each layer the inputs that its kind takes.

    `side`: height and width to which an upsampling brings x.
    """

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, side: torch.Size | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, Upsample):
                x = layer(x, side)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """Predicts the noise in latents x (B, in_channels, h, w)."""

    Boundary = Features

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        c, time_width = config, 4 * config.channels
        widths = [c.channels * m for m in c.multipliers]
        last = len(widths) - 1

        def res(in_channels: int, out_channels: int) -> ResBlock:
            return ResBlock(in_channels, out_channels, time_width, c.groups)

        def transformer(level: int, depth: int) -> list[nn.Module]:
            if depth == 0:
                return []
            args = (widths[level], depth, c.heads[level], c.context_width, c.groups, c.linear_projections)
            return [SpatialTransformer(*args)]

        self.time_embed = nn.Sequential(
            nn.Linear(c.channels, time_width), nn.SiLU(), nn.Linear(time_width, time_width)
        )
        if c.vector_width is not None:
            self.label_emb = nn.Sequential(
                nn.Sequential(
                    nn.Linear(c.vector_width, time_width), nn.SiLU(), nn.Linear(time_width, time_width)
                )
            )

        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(c.in_channels, c.channels, 3, padding=1))])
        skips = [c.channels]  # channels of each input block's output
        for level, width in enumerate(widths):
            for _ in range(c.blocks):
                self.input_blocks.append(Block(res(skips[-1], width), *transformer(level, c.depths[level])))
                skips.append(width)
            if level < last:
                self.input_blocks.append(Block(Downsample(width)))
                skips.append(width)

        before = widths[-1]
        self.middle_block = Block(
            res(before, before), *transformer(last, c.middle_depth), res(before, before)
        )

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(c.blocks + 1):
                layers = [res(before + skips.pop(), width), *transformer(level, c.depths[level])]
                if i == c.blocks and level > 0:
                    layers.append(Upsample(width))
                self.output_blocks.append(Block(*layers))
                before = width
        self.out = nn.Sequential(
            nn.GroupNorm(c.groups, before), nn.SiLU(), nn.Conv2d(before, c.out_channels, 3, padding=1)
        )

    def embed(self, t: Tensor, conditioning: UNetConditioning) -> Tensor:
        """Timesteps t (B,) and the vector -> the embedding (B, 4 * channels) that every residual block reads.

        ValueError where there is a vector and the config has none (vector_width is None), or the other way round.
        """
        takes, given = self.config.vector_width is not None, conditioning.vector is not None
        if takes != given:
            raise ValueError(
                f"the conditioning has {'a' if given else 'no'} vector, but this U-Net takes "
                + (f"one of width {self.config.vector_width}: give it." if takes else "none: give None.")
            )
        dtype = self.time_embed[0].weight.dtype
        emb = self.time_embed(sinusoid(t, self.config.channels).to(dtype))
        if takes:
            emb = emb + self.label_emb(conditioning.vector)
        return emb

    def entry(
        self, x: Tensor, t: Tensor, conditioning: UNetConditioning, cut: int
    ) -> tuple[Features, list[Tensor]]:
        """input_blocks[:cut] on the latents. Returns what crosses the cut and the skips, which stay."""
        skips = self.descend(self.input_blocks[:cut], x, t, conditioning)
        return Features(skips[-1]), skips

    def down(
        self, features: Features, t: Tensor, conditioning: UNetConditioning, outer: int, cut: int
    ) -> tuple[Features, list[Tensor]]:
        """input_blocks[outer:cut] on what crossed the cut `outer`. Returns what crosses `cut` and what `up` needs."""
        h = features.hidden  # stays at the bottom of the skips: what leaves has the side of what came
        skips = [h, *self.descend(self.input_blocks[outer:cut], h, t, conditioning)]
        return Features(skips[-1]), skips

    def inner(self, features: Features, t: Tensor, conditioning: UNetConditioning, cut: int) -> Features:
        """input_blocks[cut:], the middle, output_blocks[:n-cut]."""
        deepest, skips = self.down(features, t, conditioning, cut, self.config.input_blocks)
        h = self.middle_block(deepest.hidden, self.embed(t, conditioning), conditioning.text)
        return self.up(Features(h), skips, t, conditioning, cut, self.config.input_blocks)

    def up(
        self,
        features: Features,
        skips: list[Tensor],
        t: Tensor,
        conditioning: UNetConditioning,
        outer: int,
        cut: int,
    ) -> Features:
        """output_blocks[n-cut:n-outer] on what crossed `cut` outwards, with the skips of `down`. Returns what crosses `outer`."""
        n = self.config.input_blocks
        return Features(
            self.climb(self.output_blocks[n - cut : n - outer], features.hidden, skips, t, conditioning)
        )

    def exit(
        self, features: Features, skips: list[Tensor], t: Tensor, conditioning: UNetConditioning, cut: int
    ) -> Tensor:
        """output_blocks[n-cut:] and the output layers -> predicted noise (B, out_channels, h, w)."""
        blocks = self.output_blocks[self.config.input_blocks - cut :]
        return self.out(self.climb(blocks, features.hidden, skips, t, conditioning))

    def descend(
        self, blocks: nn.ModuleList, h: Tensor, t: Tensor, conditioning: UNetConditioning
    ) -> list[Tensor]:
        """Input blocks one after the other: the result of each."""
        emb, skips = self.embed(t, conditioning), []
        for block in blocks:
            h = block(h, emb, conditioning.text)
            skips.append(h)
        return skips

    def climb(
        self, blocks: nn.ModuleList, h: Tensor, skips: list[Tensor], t: Tensor, conditioning: UNetConditioning
    ) -> Tensor:
        """Output blocks, each on its skip too; upsampling goes to the side of the next skip, as in diffusers."""
        emb, skips = self.embed(t, conditioning), list(skips)
        for block in blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            h = block(h, emb, conditioning.text, skips[-1].shape[2:] if skips else None)
        return h

    def default_cut(self) -> int:
        """The depth at which the released SDXL code cuts: after the last downsampling (7 of 9)."""
        return self.config.input_blocks - self.config.blocks

    def nested_cut(self) -> int:
        """A cut with work on both sides: the default one is."""
        return self.default_cut()

    def cuts(self, depths: tuple[int, ...]) -> tuple[int, ...]:
        """Nested cuts from the positions between units; a unit is an input block with its output block, the last with the middle."""
        return depths

    def names(self, outer: int, cut: int) -> list[str]:
        """How the names of the parameters begin that a ring needs; a ring down to n has the middle too."""
        n = self.config.input_blocks
        blocks = [f"input_blocks.{i}." for i in range(outer, cut)] + [
            f"output_blocks.{i}." for i in range(n - cut, n - outer)
        ]
        return [
            "time_embed.",
            "label_emb.",
            *blocks,
            *(["out."] if outer == 0 else []),
            *(["middle_block."] if cut == n else []),
        ]

    def unit_sizes(self) -> list[float]:
        """About the work in each unit, whatever the size of the picture: parameters by positions at their level."""
        sizes = []
        for i, block in enumerate(self.input_blocks):
            layers = [block, self.output_blocks[self.config.input_blocks - 1 - i]]
            layers += [self.middle_block] if i == self.config.input_blocks - 1 else []
            weights = sum(p.numel() for layer in layers for p in layer.parameters())
            sizes.append(weights / 4 ** (i // (self.config.blocks + 1)))
        return sizes

    def crossing(self, latents: torch.Size, text_tokens: int, cut: int) -> tuple[Features, Features]:
        """Shapes of what leaves `entry` and of what leaves `inner`, for latents (B, C, h, w); 0 < cut < input blocks."""
        levels = [i // (self.config.blocks + 1) for i in range(self.config.input_blocks)]
        widths = [self.config.channels * m for m in self.config.multipliers]
        # a downsampling block closes its level, so the side is halved (rounded up) once more right after it
        halvings = sum(1 for i in range(1, cut) if i % (self.config.blocks + 1) == 0)
        b, _, h, w = latents
        h, w = -(-h >> halvings), -(-w >> halvings)
        # such a block still has the width of the level that it closes
        entry_width = widths[
            max(0, levels[cut - 1] - (1 if (cut - 1) % (self.config.blocks + 1) == 0 else 0))
        ]
        inner_level = len(widths) - 1 - levels[self.config.input_blocks - cut - 1]
        return Features(torch.Size((b, entry_width, h, w))), Features(
            torch.Size((b, widths[inner_level], h, w))
        )

    def forward(self, x: Tensor, t: Tensor, conditioning: UNetConditioning) -> Tensor:
        cut = self.default_cut()
        features, skips = self.entry(x, t, conditioning, cut)
        return self.exit(self.inner(features, t, conditioning, cut), skips, t, conditioning, cut)
