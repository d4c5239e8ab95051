"""Sizes of an MMDiT, read off its tensors, and its names in a Hugging Face folder.

Facts: diffusers, scripts/convert_sd3_to_diffusers.py.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from models.names import Rule, copy, one_of
from models.sizes import HEAD_WIDTH, Shapes, at_least_one, heads, how_many, size


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
    def multiple(self) -> int:
        """Height and width of the latents must be multiples of this."""
        return self.patch

    @property
    def largest(self) -> int:
        """Height and width of the latents must not be more than this."""
        return self.positions * self.patch

    @classmethod
    def from_shapes(cls, shapes: Shapes, given: Mapping[str, Any] = MappingProxyType({})) -> "MMDiTConfig":
        """Sizes of an MMDiT; query norms, where there are any, tell the head width."""
        width = size(shapes, "x_embedder.proj.weight", 0, 4)
        query_norm = "joint_blocks.0.x_block.attn.ln_q.weight"
        head_width = size(shapes, query_norm, 0, 1) if query_norm in shapes else HEAD_WIDTH
        places = size(shapes, "pos_embed", 1, 3)
        if math.isqrt(places) ** 2 != places:
            raise ValueError(f"pos_embed holds {places} positions, which is no square")
        return cls(
            latent_channels=size(shapes, "x_embedder.proj.weight", 1, 4),
            patch=size(shapes, "x_embedder.proj.weight", 2, 4),
            width=width,
            depth=at_least_one(how_many(shapes, r"joint_blocks\.(\d+)\."), "joint blocks"),
            heads=heads(given, width, head_width),
            context_width=size(shapes, "context_embedder.weight", 1, 2),
            pooled_width=size(shapes, "y_embedder.mlp.0.weight", 1, 2),
            positions=math.isqrt(places),
            qk_norm=query_norm in shapes,
            dual_blocks=how_many(shapes, r"joint_blocks\.(\d+)\.x_block\.attn2\."),
        )


MMDIT_ENDS = {"pos_embed.proj": "x_embedder.proj", "context_embedder": "context_embedder",
              "proj_out": "final_layer.linear",
              "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
              "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
              "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
              "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2"}  # fmt: skip
MMDIT_BLOCK = {  # inside a joint block, everything but q, k, v and the modulations
    "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q", "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q", "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj", "attn2.norm_q": "x_block.attn2.ln_q", "attn2.norm_k": "x_block.attn2.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
    "norm1.linear": "x_block.adaLN_modulation.1",
}  # fmt: skip
MMDIT_QKV = {"attn.to_": "x_block.attn", "attn2.to_": "x_block.attn2", "attn.add_": "context_block.attn"}


def hugging_face(keys: Collection[str]) -> list[Rule]:
    """Hugging Face MMDiT: q, k, v apart; (scale, shift) instead of (shift, scale) where there is no gate."""
    last = how_many(keys, r"transformer_blocks\.(\d+)\.") - 1
    block = r"transformer_blocks\.(\d+)\."

    def context_modulation(i: str, kind: str) -> list[tuple[str, str]]:
        how = "swap" if int(i) == last else "copy"  # the last context block has no gate
        return [(f"joint_blocks.{i}.context_block.adaLN_modulation.1.{kind}", how)]

    return [
        (r"pos_embed\.pos_embed", lambda: copy("pos_embed")),
        (rf"({one_of(MMDIT_ENDS)})\.(weight|bias)",
         lambda end, kind: copy(f"{MMDIT_ENDS[end]}.{kind}")),
        (r"norm_out\.linear\.(weight|bias)", lambda kind: [(f"final_layer.adaLN_modulation.1.{kind}", "swap")]),
        (block + r"norm1_context\.linear\.(weight|bias)", context_modulation),
        (block + rf"({one_of(MMDIT_BLOCK)})\.(weight|bias)",
         lambda i, layer, kind: copy(f"joint_blocks.{i}.{MMDIT_BLOCK[layer]}.{kind}")),
        (block + r"(attn2?\.to_|attn\.add_)([qkv])(?:_proj)?\.(weight|bias)",
         lambda i, stream, piece, kind: [(f"joint_blocks.{i}.{MMDIT_QKV[stream]}.qkv.{kind}", piece)]),
    ]  # fmt: skip
