"""The MMDiT of SD3 and SD3.5, written so that it can be cut.

Follows Stability-AI/sd3.5, mmditx.py (Esser et al. 2024, arXiv 2403.03206); parameter names are those of the official
single file after `model.diffusion_model.`.

A *cut* is a range (a, b) of the joint blocks. `entry` embeds latents and text and runs blocks [0, a); `inner` runs [a, b);
`exit` runs [b, depth) and the final layer. Image and text tokens cross. `forward` is exit(inner(entry)), whatever the cut.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.embeddings import sinusoid


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes of an MMDiT; the defaults are SD3-medium."""

    latent_channels: int = 16
    patch: int = 2
    width: int = 1536
    depth: int = 24
    heads: int = 24
    context_width: int = 4096
    pooled_width: int = 2048
    positions: int = 192  # side of the stored grid of position embeddings, in patches
    qk_norm: bool = False
    dual_blocks: int = 0  # the first so many blocks have a second self-attention over the image tokens (SD3.5-medium)

    @property
    def multiple(self) -> int:
        """Height and width of the latents must be multiples of this."""
        return self.patch

    @property
    def largest(self) -> int:
        """Height and width of the latents must not be more than this."""
        return self.positions * self.patch


class MMDiTConditioning(NamedTuple):
    """What one branch tells the network about its text."""

    text: Tensor  # (B, L, context_width)
    pooled: Tensor  # (B, pooled_width)


class Tokens(NamedTuple):
    """What crosses the cut, in either direction."""

    image: Tensor  # (B, h/2 * w/2, width)
    text: Tensor  # (B, L, width)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive LayerNorm: x (B, N, C) * (1 + scale) + shift, both (B, C)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, eps 1e-6, computed in fp32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)
        return h.to(x.dtype) * self.weight


class Attention(nn.Module):
    """The projections of one stream's attention; the attention itself is computed over both streams by the block."""

    def __init__(self, width: int, heads: int, qk_norm: bool, output: bool = True):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        if output:
            self.proj = nn.Linear(width, width)
        if qk_norm:
            self.ln_q = RMSNorm(width // heads)
            self.ln_k = RMSNorm(width // heads)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, N, C) -> q, k, v, each (B, heads, N, C / heads)."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        if hasattr(self, "ln_q"):
            q, k = self.ln_q(q), self.ln_k(k)
        return q, k, v


class MLP(nn.Module):
    """Linear, GELU (tanh form), Linear; four times as wide inside."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class StreamBlock(nn.Module):
    """One stream (image or text) of a joint block. The last block's text stream has no output side (`last`)."""

    def __init__(self, width: int, heads: int, qk_norm: bool, dual: bool = False, last: bool = False):
        super().__init__()
        self.chunks = 2 if last else 9 if dual else 6
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm, output=not last)
        if dual:
            self.attn2 = Attention(width, heads, qk_norm)
        if not last:
            self.mlp = MLP(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.chunks * width))

    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        """Conditioning c (B, C) -> shift, scale[, gate, shift, scale, gate of the MLP[, the same of attn2]]."""
        return self.adaLN_modulation(c).chunk(self.chunks, dim=-1)

    def finish(self, x: Tensor, normed: Tensor, attended: Tensor, mod: tuple[Tensor, ...]) -> Tensor:
        """Add the joint attention's result, then the second attention (if any), then the MLP."""
        gate, shift_mlp, scale_mlp, gate_mlp = mod[2:6]
        x = x + gate[:, None] * self.attn.proj(attended)
        if self.chunks == 9:
            shift2, scale2, gate2 = mod[6:]
            q, k, v = self.attn2.project(modulate(normed, shift2, scale2))
            attended2 = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
            x = x + gate2[:, None] * self.attn2.proj(attended2)
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm(x), shift_mlp, scale_mlp))


class JointBlock(nn.Module):
    """Both streams attend to both streams; everything else is separate."""

    def __init__(self, width: int, heads: int, qk_norm: bool, dual: bool, last: bool):
        super().__init__()
        self.context_block = StreamBlock(width, heads, qk_norm, last=last)
        self.x_block = StreamBlock(width, heads, qk_norm, dual=dual)

    def forward(self, tokens: Tokens, c: Tensor) -> Tokens:
        image, text = tokens
        image_mod, text_mod = self.x_block.modulation(c), self.context_block.modulation(c)
        image_normed, text_normed = self.x_block.norm(image), self.context_block.norm(text)
        image_qkv = self.x_block.attn.project(modulate(image_normed, *image_mod[:2]))
        text_qkv = self.context_block.attn.project(modulate(text_normed, *text_mod[:2]))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(text_qkv, image_qkv))  # (B, heads, L + N, d), text first
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        text_attended, image_attended = attended.split([text.shape[1], image.shape[1]], dim=1)
        image = self.x_block.finish(image, image_normed, image_attended, image_mod)
        if self.context_block.chunks > 2:
            text = self.context_block.finish(text, text_normed, text_attended, text_mod)
        return Tokens(image, text)


class PatchEmbed(nn.Module):
    """Latents (B, C, h, w) -> tokens (B, h/p * w/p, width), row by row."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.latent_channels, config.width, config.patch, stride=config.patch)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.proj(x), "b c h w -> b (h w) c")


class Embedder(nn.Module):
    """Linear, SiLU, Linear: lifts a sinusoid or the pooled text to the width of the network."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class FinalLayer(nn.Module):
    """Modulated LayerNorm, then one Linear to a patch of the prediction."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.norm_final = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(config.width, config.patch**2 * config.latent_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class MMDiT(nn.Module):
    """Predicts the velocity (noise - image) of latents x (B, C, h, w); h and w multiples of the patch."""

    Boundary = Tokens
    frequencies = 256  # width of the sinusoid of the time

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config = config
        c = config
        self.x_embedder = PatchEmbed(c)
        self.context_embedder = nn.Linear(c.context_width, c.width)
        self.t_embedder = Embedder(self.frequencies, c.width)
        self.y_embedder = Embedder(c.pooled_width, c.width)
        # a stored table, loaded and cropped around its centre, never recomputed
        self.register_buffer("pos_embed", torch.zeros(1, c.positions**2, c.width))
        self.joint_blocks = nn.ModuleList(
            JointBlock(c.width, c.heads, c.qk_norm, dual=i < c.dual_blocks, last=i == c.depth - 1)
            for i in range(c.depth)
        )
        self.final_layer = FinalLayer(c)

    def positions(self, h: int, w: int) -> Tensor:
        """The centred h x w crop of the stored grid, as tokens (1, h * w, width)."""
        top, left = (self.config.positions - h) // 2, (self.config.positions - w) // 2
        grid = self.pos_embed.unflatten(1, (self.config.positions, self.config.positions))
        return grid[:, top : top + h, left : left + w].flatten(1, 2)

    def embed(self, t: Tensor, conditioning: MMDiTConditioning) -> Tensor:
        """Times t = 1000 * sigma (B,) and pooled text -> the conditioning vector (B, width) of every block."""
        time = sinusoid(t, self.frequencies).to(self.context_embedder.weight.dtype)
        return self.t_embedder(time) + self.y_embedder(conditioning.pooled)

    def run_blocks(self, tokens: Tokens, t: Tensor, conditioning: MMDiTConditioning, start: int, stop: int) -> Tokens:
        """Joint blocks [start, stop)."""
        c = self.embed(t, conditioning)
        for block in self.joint_blocks[start:stop]:
            tokens = block(tokens, c)
        return tokens

    def entry(
        self, x: Tensor, t: Tensor, conditioning: MMDiTConditioning, cut: tuple[int, int]
    ) -> tuple[Tokens, tuple[int, int]]:
        """Embed latents and text, run blocks [0, a). Returns what crosses the cut and the grid (h, w), which stays."""
        h, w = x.shape[2] // self.config.patch, x.shape[3] // self.config.patch
        tokens = Tokens(self.x_embedder(x) + self.positions(h, w), self.context_embedder(conditioning.text))
        return self.run_blocks(tokens, t, conditioning, 0, cut[0]), (h, w)

    def inner(self, tokens: Tokens, t: Tensor, conditioning: MMDiTConditioning, cut: tuple[int, int]) -> Tokens:
        """Joint blocks [a, b)."""
        return self.run_blocks(tokens, t, conditioning, *cut)

    def exit(
        self,
        tokens: Tokens,
        grid: tuple[int, int],
        t: Tensor,
        conditioning: MMDiTConditioning,
        cut: tuple[int, int],
    ) -> Tensor:
        """Joint blocks [b, depth) and the final layer -> velocity (B, C, h, w)."""
        tokens = self.run_blocks(tokens, t, conditioning, cut[1], self.config.depth)
        patches = self.final_layer(tokens.image, self.embed(t, conditioning))
        p = self.config.patch
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], p=p, q=p)

    def default_cut(self) -> tuple[int, int]:
        """The paper's cut of SD3: the first half of the blocks is inner, the second half exit, the entry empty."""
        return 0, self.config.depth // 2

    def nested_cut(self) -> tuple[int, int]:
        """A cut with work on both sides: the half of the blocks in the middle is inner."""
        return self.config.depth // 4, self.config.depth // 4 + self.config.depth // 2

    def crossing(self, latents: torch.Size, text_tokens: int, cut: tuple[int, int]) -> tuple[Tokens, Tokens]:
        """Shapes of what leaves `entry` and of what leaves `inner`, for latents of shape (B, C, h, w)."""
        b, _, h, w = latents
        image = torch.Size((b, (h // self.config.patch) * (w // self.config.patch), self.config.width))
        tokens = Tokens(image, torch.Size((b, text_tokens, self.config.width)))
        return tokens, tokens

    def forward(self, x: Tensor, t: Tensor, conditioning: MMDiTConditioning) -> Tensor:
        cut = self.default_cut()
        tokens, grid = self.entry(x, t, conditioning, cut)
        return self.exit(self.inner(tokens, t, conditioning, cut), grid, t, conditioning, cut)
