"""T5 v1.1 encoder (SD3's third text encoder; the defaults are T5-XXL).

Parameter names equal the official `t5xxl_fp16.safetensors`, except that the embedding table, which that file holds
twice, is here once as `shared.weight`. Architecture: Raffel et al. 2020 and Shazeer 2020 (gated GELU).
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import LongTensor, Tensor, nn

from models.names import Rule, copy, identity
from models.sizes import Shapes, divide, how_many, layers, number, size

LAYERS = {4096: 24}  # of the official encoder, by width


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 encoder; the defaults are T5-XXL."""

    vocabulary: int = 32128
    width: int = 4096
    layers: int = 24
    heads: int = 64
    head_width: int = 64
    mlp_width: int = 10240
    buckets: int = 32  # relative positions share one bias per bucket and head
    max_distance: int = 128  # all distances from here on share the last bucket

    @classmethod
    def from_shapes(cls, shapes: Shapes, given: Mapping[str, Any] = MappingProxyType({})) -> "T5Config":
        """Sizes from official names and shapes; `given` may have max_distance, layers. ValueError where they make up no T5."""
        first, width = "encoder.block.0.layer.0.SelfAttention", size(shapes, "shared.weight", 1, 2)
        bias_heads = size(shapes, f"{first}.relative_attention_bias.weight", 1, 2)
        buckets = size(shapes, f"{first}.relative_attention_bias.weight", 0, 2)
        max_distance = number(given, "max_distance", 128)
        if buckets < 4 or max_distance <= buckets // 4:
            raise ValueError(f"{buckets} position buckets up to a distance of {max_distance} are impossible")
        return cls(
            vocabulary=size(shapes, "shared.weight", 0, 2),
            width=width,
            layers=layers(how_many(shapes, r"encoder\.block\.(\d+)\."), LAYERS, width, given),
            heads=bias_heads,
            head_width=divide(size(shapes, f"{first}.q.weight", 0, 2), bias_heads, "attention heads"),
            mlp_width=size(shapes, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 0, 2),
            buckets=buckets,
            max_distance=max_distance,
        )


def transformers(keys: Collection[str]) -> list[Rule]:
    """transformers' naming; the embedding table is stored under one or both of two names."""
    table = "shared.weight" if "shared.weight" in keys else "encoder.embed_tokens.weight"
    return [
        (re.escape(table), lambda: copy("shared.weight")),
        (r"encoder\.embed_tokens\.weight", lambda: []),  # the second copy
        identity(r"encoder\."),
    ]


def relative_buckets(
    length: int, buckets: int, max_distance: int, device: torch.device | None = None
) -> LongTensor:
    """Bucket of key position minus query position, [length (query), length (key)] (Raffel et al. 2020, section 2.1).

    Half of the buckets are for keys after the query. Of each half, the first half holds one distance per bucket, the
    rest grows logarithmically up to `max_distance`.
    """
    positions = torch.arange(length, device=device)
    offset = positions[None, :] - positions[:, None]  # [query, key]
    half, exact = buckets // 2, buckets // 4
    distance = offset.abs()
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (offset > 0)


class RMSNorm(nn.Module):
    """Root mean square norm in fp32, eps 1e-6, no mean and no bias; returns the dtype of its weight."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)
        return self.weight * x.to(self.weight.dtype)


class Linear(nn.Linear):
    """A linear layer without bias whose weight may be stored in fp8; it is brought to the input's dtype where it is used."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return F.linear(x, self.weight.to(x.dtype))


class SelfAttention(nn.Module):
    """Multi-head attention with an additive position bias and without the 1/sqrt(d) of the logits."""

    def __init__(self, config: T5Config, owns_bias: bool):
        super().__init__()
        self.config = config
        inner = config.heads * config.head_width
        self.q = Linear(config.width, inner)
        self.k = Linear(config.width, inner)
        self.v = Linear(config.width, inner)
        self.o = Linear(inner, config.width)
        if owns_bias:
            self.relative_attention_bias = nn.Embedding(config.buckets, config.heads)

    def position_bias(self, length: int) -> Tensor:
        """The bias added to the logits, [1, heads, length, length]; only block 0 has the table."""
        table = self.relative_attention_bias
        buckets = relative_buckets(length, self.config.buckets, self.config.max_distance, table.weight.device)
        return rearrange(table(buckets), "query key h -> 1 h query key")

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """[B, L, width], bias [1, heads, L, L] -> [B, L, width]."""
        q, k, v = (
            rearrange(project(x), "b l (h d) -> b h l d", h=self.config.heads)
            for project in (self.q, self.k, self.v)
        )
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # [B, heads, L, head_width]
        return self.o(rearrange(x, "b h l d -> b l (h d)"))


class DenseReluDense(nn.Module):
    """Gated GELU (tanh) MLP, under the name the files kept from T5 1.0."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.wi_0 = Linear(config.width, config.mlp_width)
        self.wi_1 = Linear(config.width, config.mlp_width)
        self.wo = Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, width] -> [B, L, width] in fp32: the output of `wo` overflows fp16 in the trained T5-XXL."""
        x = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)
        return self.wo(x.float())


class AttentionLayer(nn.Module):
    """Pre-norm attention with its residual (`layer.0` of a block)."""

    def __init__(self, config: T5Config, owns_bias: bool):
        super().__init__()
        self.SelfAttention = SelfAttention(config, owns_bias)
        self.layer_norm = RMSNorm(config.width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """[B, L, width] -> [B, L, width]."""
        return x + self.SelfAttention(self.layer_norm(x), bias)


class MLPLayer(nn.Module):
    """Pre-norm MLP with its residual (`layer.1` of a block)."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.DenseReluDense = DenseReluDense(config)
        self.layer_norm = RMSNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, width] -> [B, L, width]."""
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(nn.Module):
    """One transformer block: attention, then MLP."""

    def __init__(self, config: T5Config, owns_bias: bool):
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(config, owns_bias), MLPLayer(config)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """[B, L, width], bias [1, heads, L, L] -> [B, L, width]."""
        attention, mlp = self.layer
        return mlp(attention(x, bias))


class Encoder(nn.Module):
    """The blocks and the final norm; the position bias of block 0 serves all of them."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.block = nn.ModuleList(Block(config, owns_bias=i == 0) for i in range(config.layers))
        self.final_layer_norm = RMSNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Embedded tokens [B, L, width] -> [B, L, width] in the dtype of the weights; the residual stream is fp32."""
        bias = self.block[0].layer[0].SelfAttention.position_bias(x.shape[1])
        x = x.float()
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)


class T5Encoder(nn.Module):
    """T5 encoder as SD3 uses it: the final-normed last state, pad tokens attended like any other."""

    Config, title = T5Config, "T5 encoder"
    namings = (("", transformers),)
    surplus = r"logit_scale|(?:decoder|lm_head)\..*"  # the half that writes
    # of a Hugging Face config.json
    json_fields = {"relative_attention_max_distance": "max_distance", "num_layers": "layers"}

    def __init__(self, config: T5Config = T5Config()):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocabulary, config.width)
        self.encoder = Encoder(config)

    def forward(self, ids: LongTensor) -> Tensor:
        """Token ids [B, L] -> last state with final norm [B, L, width]."""
        return self.encoder(self.shared(ids))
