"""The MMDiT of SD3 and SD3.5, as a tape of units (`models/tape.py`): its joint blocks.

Follows Stability-AI/sd3.5, mmditx.py (Esser et al. 2024, arXiv 2403.03206); parameter names are those of the official
single file after `model.diffusion_model.`.

The embedding goes with the first block, the final layer with the last; image and text tokens cross wherever the network is cut.
The tokens can be divided too (sequence parallelism): a shard has some rows of the image's patches and some tokens of the text, and in
every block reads the keys and values of all shards.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.embeddings import sinusoid
from models.mmdit_config import MMDiTConfig, hugging_face
from models.names import official
from models.tape import Features, Shard, Size, Span, Split, best_cuts, spans_between


class MMDiTConditioning(NamedTuple):
    """What one branch tells the network about its text."""

    text: Tensor  # (B, L, context_width)
    pooled: Tensor  # (B, pooled_width)


class Tokens(NamedTuple):
    """What crosses a position between two blocks."""

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


class ShardTokens(NamedTuple):
    """A shard's tokens on their way through the network."""

    tokens: Tokens
    c: Tensor  # (B, width), the conditioning vector of every block


def rows_of(shard: Shard, length: int) -> int:
    """How many of so many rows or tokens fall to a shard."""
    return len(range(length)[shard.of(length)])


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

    Config, title = MMDiTConfig, "MMDiT"
    namings = (("joint_blocks.", official), ("transformer_blocks.", hugging_face))
    json_fields = {"attention_head_dim": "head_width"}  # of a Hugging Face config.json
    surplus = ""
    shardable = True
    frequencies = 256  # width of the sinusoid of the time

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config = c = config
        self.units = self.most_ranks = c.depth
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

    def predict(self, image: Tensor, c: Tensor, size: Size) -> Tensor:
        """The final layer: image tokens, in rows of w patches -> velocity (B, C, h, w)."""
        p = self.config.patch
        out = self.final_layer(image, c)
        return rearrange(out, "b (h w) (p q c) -> b c (h p) (w q)", w=size[1] // p, p=p, q=p)

    def run(
        self,
        span: Span,
        x: Features,
        kept: dict[int, Tensor],
        t: Tensor,
        conditioning: MMDiTConditioning,
        size: Size,
    ) -> Features:
        """Blocks [start, stop) on latents x (B, C, h, w) or tokens; see `models.tape.Denoiser`. Leaves `kept` alone."""
        (start, stop), c = span, self.embed(t, conditioning)
        if start == 0:
            places = self.positions(*self.patches(x))
            tokens = Tokens(self.x_embedder(x) + places, self.context_embedder(conditioning.text))
        else:
            tokens = Tokens(*x)
        for block in self.joint_blocks[start:stop]:
            tokens = block(tokens, c)
        return self.predict(tokens.image, c, size) if stop == self.units else tokens

    def project(
        self,
        unit: int,
        x: Tensor | ShardTokens,
        t: Tensor,
        conditioning: MMDiTConditioning,
        size: Size,
        shard: Shard,
    ) -> tuple[tuple[ShardTokens, Queries], Keys]:
        """The first half of a block on a shard; see `models.tape.Denoiser`. Block 0 embeds the shard's rows of the latents x (B, C, h, w)."""
        if unit == 0:
            (h, w), p = self.patches(x), self.config.patch
            rows, words = shard.of(h), shard.of(conditioning.text.shape[1])
            places = self.positions(h, w)[:, rows.start * w : rows.stop * w]
            image = self.x_embedder(x[:, :, rows.start * p : rows.stop * p]) + places
            text = self.context_embedder(conditioning.text[:, words])
            x = ShardTokens(Tokens(image, text), self.embed(t, conditioning))
        queries, keys = self.joint_blocks[unit].project(*x)
        return (x, queries), keys

    def attend(
        self, unit: int, state: tuple[ShardTokens, Queries], keys: Sequence[Sequence[Tensor]], size: Size
    ) -> ShardTokens | Tensor:
        """The second half, with the keys and values of all shards in order. The last block returns the shard's rows of the velocity."""
        (tokens, c), queries = state
        together = Keys(*(None if same[0] is None else torch.cat(same, dim=2) for same in zip(*keys)))
        tokens = self.joint_blocks[unit].attend(tokens, queries, together)
        return self.predict(tokens.image, c, size) if unit == self.units - 1 else ShardTokens(tokens, c)

    def split(
        self, ranks: int, times: Sequence[Sequence[float]] | None = None, nested: bool = False
    ) -> Split:
        """One span a rank, in order; two ranks halve the blocks, as the paper does. Nested: rank 0 owns the half in the middle."""
        depth = self.config.depth
        if ranks > depth or nested and (ranks != 2 or depth < 4):
            raise ValueError(f"an MMDiT of {depth} blocks cannot be split over {ranks} ranks")
        if nested:
            return Split(spans_between((depth // 4, depth // 4 + depth // 2), depth), (1, 0, 1))
        halves = ranks == 2 and times is None
        cuts = (depth // 2,) if halves else best_cuts(times or [[1.0] * depth] * ranks)
        return Split(spans_between(cuts, depth), tuple(range(ranks)))

    def parameters_of(self, span: Span) -> tuple[str, ...]:
        """How the names of the parameters begin that a span needs."""
        first = ("x_embedder.", "context_embedder.", "pos_embed") if span[0] == 0 else ()
        last = ("final_layer.",) if span[1] == self.units else ()
        blocks = (f"joint_blocks.{unit}." for unit in range(*span))
        return ("t_embedder.", "y_embedder.", *first, *blocks, *last)

    def shapes(
        self, at: int, latents: torch.Size, text_tokens: int, shard: Shard | None = None
    ) -> tuple[torch.Size, ...]:
        """Shapes of the image and the text tokens, or of the velocity (all rows, or a shard's), for latents (B, C, h, w)."""
        (b, channels, h, w), p = latents, self.config.patch
        if at < self.units:
            lengths = (h // p) * (w // p), text_tokens
            return tuple(torch.Size((b, length, self.config.width)) for length in lengths)
        return (torch.Size((b, channels, p * rows_of(shard or Shard(0, 1), h // p), w)),)

    def key_shapes(
        self, unit: int, latents: torch.Size, text_tokens: int, shard: Shard
    ) -> tuple[torch.Size, ...]:
        """Shapes of the tensors in `Keys`, for latents (B, C, h, w)."""
        (b, _, h, w), p, heads = latents, self.config.patch, self.config.heads
        lengths = rows_of(shard, text_tokens), rows_of(shard, h // p) * (w // p)
        text, image = (torch.Size((b, heads, length, self.config.width // heads)) for length in lengths)
        return (text, text, *[image] * (4 if unit < self.config.dual_blocks else 2))

    def forward(self, x: Tensor, t: Tensor, conditioning: MMDiTConditioning) -> Tensor:
        return self.run((0, self.units), x, {}, t, conditioning, x.shape[2:])
