"""The U-Net of SDXL (SD 1.5 is another config of it), as a tape of units (`models/tape.py`).

Follows Stability-AI/generative-models, sgm/modules/diffusionmodules/openaimodel.py and sgm/modules/attention.py; parameter
names are those of the official single file after `model.diffusion_model.`.

The units are n input blocks, the middle, and n output blocks. The output of input block i is added to what output block n - 1 - i
reads; these skips stay with whoever runs both, so that one tensor crosses wherever the network is cut.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.embeddings import sinusoid
from models.names import official
from models.tape import Shard, Size, Span, Split, best_cuts, spans_between
from models.unet_config import UNetConfig, hugging_face


class UNetConditioning(NamedTuple):
    """What one branch tells the network about its text."""

    text: Tensor  # (B, L, context_width)
    vector: Tensor | None  # (B, vector_width): pooled text, then six size sinusoids


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

    Config, title = UNetConfig, "U-Net"
    namings = (("input_blocks.", official), ("down_blocks.", hugging_face))
    # of a Hugging Face config.json; attention_head_dim is the number of heads (diffusers, UNet2DConditionModel)
    json_fields = {"attention_head_dim": "heads", "num_attention_heads": "heads", "norm_num_groups": "groups"}
    surplus = ""
    shardable = False

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.units = 2 * config.input_blocks + 1
        self.most_ranks = config.input_blocks
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

    def run(
        self,
        span: Span,
        x: Tensor,
        kept: dict[int, Tensor],
        t: Tensor,
        conditioning: UNetConditioning,
        size: Size,
    ) -> Tensor:
        """Units [start, stop) on latents or features x (B, C, h, w); see `models.tape.Denoiser`.

        `kept[i]` is the output of input block i: the skip of the output block that mirrors it. The features that cross
        `start` on the way down are kept too, since upsampling on the way back goes to their height and width, as in diffusers.
        """
        (start, stop), n, emb = span, self.config.input_blocks, self.embed(t, conditioning)
        if 0 < start < n:
            kept[start - 1] = x
        for unit in range(start, stop):
            if unit < n:
                x = kept[unit] = self.input_blocks[unit](x, emb, conditioning.text)
            elif unit == n:
                x = self.middle_block(x, emb, conditioning.text)
            else:
                mirrored = 2 * n - unit
                x = torch.cat([x, kept.pop(mirrored)], dim=1)
                side = kept[mirrored - 1].shape[2:] if mirrored else None
                x = self.output_blocks[unit - n - 1](x, emb, conditioning.text, side)
        return self.out(x) if stop == self.units else x

    def split(
        self, ranks: int, times: Sequence[Sequence[float]] | None = None, nested: bool = False
    ) -> Split:
        """Spans that nest, so that skips stay on their rank: the last rank owns both ends, rank 0 the innermost span.

        Two ranks are split where the released SDXL code cuts: after the last downsampling (7 of 9 input blocks).
        """
        n = self.config.input_blocks

        def paired(row: Sequence[float]) -> list[float]:
            """Each input block with the output block that mirrors it, the last one with the middle too."""
            return [row[i] + row[2 * n - i] + (row[n] if i == n - 1 else 0) for i in range(n)]

        if ranks > n:
            raise ValueError(f"a U-Net of {n} input blocks cannot be split over {ranks} ranks")
        if ranks == 2 and times is None:
            depths: tuple[int, ...] = (n - self.config.blocks,)
        else:
            depths = best_cuts([paired(row) for row in reversed(times or [self.unit_sizes()] * ranks)])
        spans = spans_between((*depths, *(self.units - depth for depth in reversed(depths))), self.units)
        return Split(spans, tuple(ranks - 1 - min(j, len(spans) - 1 - j) for j in range(len(spans))))

    def unit_sizes(self) -> list[float]:
        """About the work in each unit, whatever the size of the picture: parameters by positions at their level."""
        n, down = self.config.input_blocks, [*self.input_blocks, self.middle_block]
        levels = [min(i, n - 1) // (self.config.blocks + 1) for i in (*range(n + 1), *reversed(range(n)))]
        blocks = [*down, *self.output_blocks]
        return [sum(p.numel() for p in block.parameters()) / 4**level for block, level in zip(blocks, levels)]

    def parameters_of(self, span: Span) -> tuple[str, ...]:
        """How the names of the parameters begin that a span needs."""
        n = self.config.input_blocks
        names = ["time_embed.", "label_emb."]
        for unit in range(*span):
            inwards, outwards = f"input_blocks.{unit}.", f"output_blocks.{unit - n - 1}."
            names.append(inwards if unit < n else "middle_block." if unit == n else outwards)
        return (*names, *(["out."] if span[1] == self.units else []))

    def shapes(
        self, at: int, latents: torch.Size, text_tokens: int, shard: Shard | None = None
    ) -> tuple[torch.Size, ...]:
        """Shape of the one tensor that crosses position `at`, for latents (B, C, h, w)."""
        n, per_level = self.config.input_blocks, self.config.blocks + 1
        widths = [self.config.channels * m for m in self.config.multipliers]
        b, _, h, w = latents
        if at == self.units:
            return (torch.Size((b, self.config.out_channels, h, w)),)
        depth = min(at, self.units - at)  # of input blocks on the way there and of those yet to come back
        # the first block of a level, the first one of all aside, is the downsampling that closes the level before
        halvings = (depth - 1) // per_level
        if at <= n:
            width = widths[max(0, -(-(depth - 1) // per_level) - 1)]
        else:
            width = widths[-1 if at == n + 1 else -1 - (at - n - 2) // per_level]
        return (torch.Size((b, width, -(-h >> halvings), -(-w >> halvings))),)

    def forward(self, x: Tensor, t: Tensor, conditioning: UNetConditioning) -> Tensor:
        return self.run((0, self.units), x, {}, t, conditioning, x.shape[2:])
