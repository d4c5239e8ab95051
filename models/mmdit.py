"""The MMDiT of SD3 and SD3.5, written so that it can be cut.

Follows Stability-AI/sd3.5, mmditx.py (Esser et al. 2024, arXiv 2403.03206); parameter names are those of the official
single file after `model.diffusion_model.`.

A *cut* is a range (a, b) of the joint blocks. `entry` embeds latents and text and runs blocks [0, a); `inner` runs [a, b);
`exit` runs [b, depth) and the final layer. Image and text tokens cross. `forward` is exit(inner(entry)), whatever the cut.

The sequence can be divided too: `begin` takes some rows of the image's patches and some of the text's tokens, and then `keys`
and `attend` run one block after the other on this slice alone, given the keys and values of the other slices; `end` leaves its rows of the prediction.
"""

from dataclasses import dataclass
from typing import NamedTuple, Sequence

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
    dual_blocks: int = (
        0  # the first so many blocks have a second self-attention over the image tokens (SD3.5-medium)
    )

    @property
    def segments(self) -> int:
        """Into how many segments it can be cut at most."""
        return self.depth

    @property
    def shared_blocks(self) -> int:
        """How many blocks several devices can share by slices of the sequence: all."""
        return self.depth

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


class Keys(NamedTuple):
    """Keys and values of some tokens in one block, each (B, heads, tokens, width / heads)."""

    text_k: Tensor
    text_v: Tensor
    image_k: Tensor
    image_v: Tensor
    image_k2: Tensor | None = None  # of the second attention, where the block has one
    image_v2: Tensor | None = None


class Modulation(NamedTuple):
    """What a stream's block takes from the conditioning, each (B, C), in the order of the linear layer's rows: shift and scale after a
    norm and the gate of what is added, for the joint attention, for the MLP and for the second attention.
    """

    shift: Tensor
    scale: Tensor
    gate: Tensor | None = None  # None from here on: the last block's text stream
    shift_mlp: Tensor | None = None
    scale_mlp: Tensor | None = None
    gate_mlp: Tensor | None = None
    shift2: Tensor | None = None  # None from here on: no second attention
    scale2: Tensor | None = None
    gate2: Tensor | None = None


class Queries(NamedTuple):
    """What some tokens keep for themselves between `JointBlock.project` and `JointBlock.attend`."""

    text: Tensor  # queries, as in Keys
    image: Tensor
    image2: Tensor | None
    text_mod: Modulation
    image_mod: Modulation


class Slice(NamedTuple):
    """Some of the tokens on their way through the network."""

    tokens: Tokens
    c: Tensor  # (B, width), the conditioning vector of every block
    columns: int  # patches in a row of the image


def piece(length: int, number: int, of: int) -> slice:
    """The number-th (from 1) of `of` pieces of a length, as equal as can be."""
    return slice(length * (number - 1) // of, length * number // of)


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
    """Linear, GELU (tanh form), Linear; four times as wide inside. (B, N, C) -> (B, N, C)."""

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
        self.dual, self.last = dual, last
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm, output=not last)
        if dual:
            self.attn2 = Attention(width, heads, qk_norm)
        if not last:
            self.mlp = MLP(width)
        numbers = 2 if last else 9 if dual else 6  # of what `Modulation` holds
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, numbers * width))

    def modulation(self, c: Tensor) -> Modulation:
        """Of this block, by the conditioning c (B, C)."""
        linear = self.adaLN_modulation(c)
        return Modulation(*linear.chunk(linear.shape[-1] // c.shape[-1], dim=-1))

    def finish(self, x: Tensor, attended: Tensor, attended2: Tensor | None, mod: Modulation) -> Tensor:
        """Add the joint attention's result, then the second attention's (if any), then the MLP. x, attended, attended2 (B, N, C) -> (B, N, C)."""
        x = x + mod.gate[:, None] * self.attn.proj(attended)
        if attended2 is not None:
            x = x + mod.gate2[:, None] * self.attn2.proj(attended2)
        return x + mod.gate_mlp[:, None] * self.mlp(modulate(self.norm(x), mod.shift_mlp, mod.scale_mlp))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every query attends to all keys. (B, heads, N, d) -> (B, N, heads * d)."""
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


class JointBlock(nn.Module):
    """Both streams attend to both streams; everything else is separate."""

    def __init__(self, width: int, heads: int, qk_norm: bool, dual: bool, last: bool):
        super().__init__()
        self.context_block = StreamBlock(width, heads, qk_norm, last=last)
        self.x_block = StreamBlock(width, heads, qk_norm, dual=dual)

    def project(self, tokens: Tokens, c: Tensor) -> tuple[Queries, Keys]:
        """Queries, keys and values of some tokens: all that does not need the other tokens."""
        image_mod, text_mod = self.x_block.modulation(c), self.context_block.modulation(c)
        image_normed, text_normed = self.x_block.norm(tokens.image), self.context_block.norm(tokens.text)
        image_q, *image_kv = self.x_block.attn.project(
            modulate(image_normed, image_mod.shift, image_mod.scale)
        )
        text_q, *text_kv = self.context_block.attn.project(
            modulate(text_normed, text_mod.shift, text_mod.scale)
        )
        image_q2, image_kv2 = None, []
        if self.x_block.dual:
            image_q2, *image_kv2 = self.x_block.attn2.project(
                modulate(image_normed, image_mod.shift2, image_mod.scale2)
            )
        return Queries(text_q, image_q, image_q2, text_mod, image_mod), Keys(*text_kv, *image_kv, *image_kv2)

    def attend(self, tokens: Tokens, queries: Queries, keys: Keys) -> Tokens:
        """The rest of the block for the tokens whose queries are given, with the keys and values of all tokens."""
        q = torch.cat([queries.text, queries.image], dim=2)  # (B, heads, L + N, d), text first
        k, v = torch.cat([keys.text_k, keys.image_k], dim=2), torch.cat([keys.text_v, keys.image_v], dim=2)
        text_attended, image_attended = attention(q, k, v).split(
            [tokens.text.shape[1], tokens.image.shape[1]], dim=1
        )
        attended2 = (
            None if queries.image2 is None else attention(queries.image2, keys.image_k2, keys.image_v2)
        )
        image, text = (
            self.x_block.finish(tokens.image, image_attended, attended2, queries.image_mod),
            tokens.text,
        )
        if not self.context_block.last:
            text = self.context_block.finish(text, text_attended, None, queries.text_mod)
        return Tokens(image, text)

    def forward(self, tokens: Tokens, c: Tensor) -> Tokens:
        return self.attend(tokens, *self.project(tokens, c))


class PatchEmbed(nn.Module):
    """Latents (B, C, h, w) -> tokens (B, h/p * w/p, width), row by row."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.latent_channels, config.width, config.patch, stride=config.patch)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(
            self.proj(x), "b c h w -> b (h w) c"
        ).contiguous()  # else all that is added to it stays in columns, which is slower


class Embedder(nn.Module):
    """Linear, SiLU, Linear: lifts a sinusoid or the pooled text to the width of the network. (B, inputs) -> (B, width)."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class FinalLayer(nn.Module):
    """Modulated LayerNorm, then one Linear to a patch of the prediction. x (B, N, width), c (B, width) -> (B, N, patch^2 * latent_channels)."""

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

    Boundary, Keys = Tokens, Keys
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
        """The centred h x w crop of the stored grid, as tokens (1, h * w, width). ValueError where h or w is beyond the grid."""
        side = self.config.positions
        if max(h, w) > side:
            raise ValueError(
                f"{h} x {w} patches are more than this network's grid of {side} x {side} positions: take smaller latents."
            )
        top, left = (side - h) // 2, (side - w) // 2
        grid = self.pos_embed.unflatten(1, (side, side))
        return grid[:, top : top + h, left : left + w].flatten(1, 2)

    def patches(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of patches in latents x (B, C, h, w). ValueError where h or w is no multiple of the patch."""
        (h, w), p = x.shape[2:], self.config.patch
        if h % p or w % p:
            raise ValueError(
                f"latents of {h} x {w} do not divide into patches of {p} x {p}: take multiples of {p}."
            )
        return h // p, w // p

    def embed(self, t: Tensor, conditioning: MMDiTConditioning) -> Tensor:
        """Times t = 1000 * sigma (B,) and pooled text -> the conditioning vector (B, width) of every block."""
        time = sinusoid(t, self.frequencies).to(self.context_embedder.weight.dtype)
        return self.t_embedder(time) + self.y_embedder(conditioning.pooled)

    def run_blocks(
        self, tokens: Tokens, t: Tensor, conditioning: MMDiTConditioning, start: int, stop: int
    ) -> Tokens:
        """Joint blocks [start, stop)."""
        c = self.embed(t, conditioning)
        for block in self.joint_blocks[start:stop]:
            tokens = block(tokens, c)
        return tokens

    def entry(
        self, x: Tensor, t: Tensor, conditioning: MMDiTConditioning, cut: tuple[int, int]
    ) -> tuple[Tokens, tuple[int, int]]:
        """Embed latents and text, run blocks [0, a). Returns what crosses the cut and the grid (h, w), which stays."""
        h, w = self.patches(x)
        tokens = Tokens(self.x_embedder(x) + self.positions(h, w), self.context_embedder(conditioning.text))
        return self.run_blocks(tokens, t, conditioning, 0, cut[0]), (h, w)

    def inner(
        self, tokens: Tokens, t: Tensor, conditioning: MMDiTConditioning, cut: tuple[int, int]
    ) -> Tokens:
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
        return self.predict(tokens.image, self.embed(t, conditioning), grid[1])

    def predict(self, image: Tensor, c: Tensor, columns: int) -> Tensor:
        """The final layer: image tokens in rows of `columns` -> velocity (B, C, h, w)."""
        p = self.config.patch
        return rearrange(
            self.final_layer(image, c), "b (h w) (p q c) -> b c (h p) (w q)", w=columns, p=p, q=p
        )

    def begin(self, x: Tensor, t: Tensor, conditioning: MMDiTConditioning, number: int, of: int) -> Slice:
        """Embed the number-th (from 1) of `of` slices: rows of patches of the latents x (B, C, h, w), and tokens of the text."""
        h, w = self.patches(x)
        rows, words = piece(h, number, of), piece(conditioning.text.shape[1], number, of)
        latents = x[:, :, rows.start * self.config.patch : rows.stop * self.config.patch]
        image = self.x_embedder(latents) + self.positions(h, w)[:, rows.start * w : rows.stop * w]
        tokens = Tokens(image, self.context_embedder(conditioning.text[:, words]))
        return Slice(tokens, self.embed(t, conditioning), w)

    def keys(self, part: Slice, block: int) -> tuple[Queries, Keys]:
        """The first half of a block on a slice: its queries, and the keys and values that all slices need."""
        return self.joint_blocks[block].project(part.tokens, part.c)

    def attend(self, part: Slice, block: int, queries: Queries, keys: Sequence[Keys]) -> Slice:
        """The second half of a block on a slice, with the keys and values of all slices in their order."""
        together = Keys(*(None if same[0] is None else torch.cat(same, dim=2) for same in zip(*keys)))
        return part._replace(tokens=self.joint_blocks[block].attend(part.tokens, queries, together))

    def kind(self, block: int) -> tuple[bool, bool]:
        """Blocks of one kind do the same work."""
        return self.joint_blocks[block].x_block.dual, self.joint_blocks[block].context_block.last

    def end(self, part: Slice) -> Tensor:
        """The slice's rows of the velocity (B, C, rows, w)."""
        return self.predict(part.tokens.image, part.c, part.columns)

    def default_cut(self) -> tuple[int, int]:
        """The paper's cut of SD3: the first half of the blocks is inner, the second half exit, the entry empty."""
        return 0, self.config.depth // 2

    def nested_cut(self) -> tuple[int, int]:
        """A cut with work on both sides: the half of the blocks in the middle is inner."""
        return self.config.depth // 4, self.config.depth // 4 + self.config.depth // 2

    def cuts(self, positions: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """Cuts from positions between blocks, one segment after the other."""
        return tuple(zip((0, *positions), positions))

    def unit_sizes(self) -> list[float]:
        """About the work in each block: they are alike."""
        return [1.0] * self.config.depth

    def crossing(self, latents: torch.Size, text_tokens: int, cut: tuple[int, int]) -> tuple[Tokens, Tokens]:
        """Shapes of what leaves `entry` and of what leaves `inner`, for latents of shape (B, C, h, w)."""
        b, _, h, w = latents
        image = torch.Size((b, (h // self.config.patch) * (w // self.config.patch), self.config.width))
        tokens = Tokens(image, torch.Size((b, text_tokens, self.config.width)))
        return tokens, tokens

    def sizes(
        self, latents: torch.Size, text_tokens: int, number: int, of: int, block: int
    ) -> tuple[Keys, torch.Size]:
        """Shapes of a slice's keys and values in a block, and of its rows of the prediction, for latents (B, C, h, w)."""
        (b, channels, h, w), p, heads = latents, self.config.patch, self.config.heads
        rows, words = (len(range(length)[piece(length, number, of)]) for length in (h // p, text_tokens))
        text, image = (
            torch.Size((b, heads, n, self.config.width // heads)) for n in (words, rows * (w // p))
        )
        dual = (image, image) if block < self.config.dual_blocks else ()
        return Keys(text, text, image, image, *dual), torch.Size((b, channels, rows * p, w))

    def forward(self, x: Tensor, t: Tensor, conditioning: MMDiTConditioning) -> Tensor:
        cut = self.default_cut()
        tokens, grid = self.entry(x, t, conditioning, cut)
        return self.exit(self.inner(tokens, t, conditioning, cut), grid, t, conditioning, cut)
