"""Sizes of a U-Net, read off its tensors, and its names in a Hugging Face folder.

Facts: diffusers, UNet2DConditionModel and loaders/single_file_utils.py.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from models.names import Rule, copy, one_of
from models.sizes import HEAD_WIDTH, Shapes, divide, groups, heads, how_many, size

V1_HEADS = 8  # SD 1.5: at every level


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
    def multiple(self) -> int:
        """Height and width of the latents must be multiples of this: they may be any."""
        return 1

    @classmethod
    def from_shapes(cls, shapes: Shapes, given: Mapping[str, Any] = MappingProxyType({})) -> "UNetConfig":
        """Sizes from official names and shapes; `given` may have heads, head_width, groups. ValueError where they make up no U-Net."""
        # half cosines, half sines
        channels = (
            divide(size(shapes, "input_blocks.0.0.weight", 0, 4), 2, "rows of input_blocks.0.0.weight") * 2
        )
        count = how_many(shapes, r"input_blocks\.(\d+)\.")
        # the downsampling blocks
        closing = [i for i in range(count) if f"input_blocks.{i}.0.op.weight" in shapes]
        levels, blocks = len(closing) + 1, (closing[0] if closing else count) - 1
        if blocks < 1 or count != levels * (blocks + 1):
            raise ValueError(f"{count} input blocks with {len(closing)} downsamplings do not make up a U-Net")
        firsts = [1 + level * (blocks + 1) for level in range(levels)]
        widths = [size(shapes, f"input_blocks.{i}.0.in_layers.2.weight", 0, 4) for i in firsts]
        depths = [how_many(shapes, rf"input_blocks\.{i}\.1\.transformer_blocks\.(\d+)\.") for i in firsts]
        middle_depth = how_many(shapes, r"middle_block\.1\.transformer_blocks\.(\d+)\.")
        places = [f"input_blocks.{i}.1" for i, depth in zip(firsts, depths) if depth] + ["middle_block.1"]
        context_width = size(shapes, f"{places[0]}.transformer_blocks.0.attn2.to_k.weight", 1, 2)
        linear = len(shapes.get(f"{places[0]}.proj_in.weight", ())) == 2

        def level_heads(level: int, width: int) -> int:
            listed = given.get("heads")
            if not depths[level] and not (middle_depth and level == levels - 1):
                return max(1, width // HEAD_WIDTH)  # no attention here
            if isinstance(listed, (list, tuple)):
                if len(listed) != levels:
                    raise ValueError(f"the configuration gives heads = {listed!r:.50} for {levels} levels")
                return heads({"heads": listed[level]}, width)
            if listed is None and "head_width" not in given and not linear:
                return heads({"heads": V1_HEADS}, width)
            return heads(given, width)

        check_whole(shapes, count, blocks, depths)
        vector = "label_emb.0.0.weight"
        return cls(
            in_channels=size(shapes, "input_blocks.0.0.weight", 1, 4),
            out_channels=size(shapes, "out.2.weight", 0, 4),
            channels=channels,
            multipliers=tuple(divide(width, channels, "channels of a level") for width in widths),
            blocks=blocks,
            depths=tuple(depths),
            middle_depth=middle_depth,
            heads=tuple(level_heads(level, width) for level, width in enumerate(widths)),
            context_width=context_width,
            vector_width=size(shapes, vector, 1, 2) if vector in shapes else None,
            groups=groups(given, channels),
            linear_projections=linear,
        )


def check_whole(shapes: Shapes, count: int, blocks: int, depths: list[int]) -> None:
    """ValueError where a U-Net was pruned block by block, so that its levels no longer tell its sizes."""
    middle = ("middle_block.0.", "middle_block.1.transformer_blocks.", "middle_block.2.")
    there = [any(name.startswith(layer) for name in shapes) for layer in middle]
    missing = "it has no middle block" if not any(there) else "its middle block is not whole"
    reasons = [missing] if any(depths) and not all(there) else []
    for half in ("input", "output"):
        for i in range(count):
            level = i // (blocks + 1) if half == "input" else len(depths) - 1 - i // (blocks + 1)
            if half == "input" and i % (blocks + 1) == 0:
                continue  # the first convolution, or a downsampling
            found = how_many(shapes, rf"{half}_blocks\.{i}\.1\.transformer_blocks\.(\d+)\.")
            if found != depths[level]:
                reasons.append(
                    f"{half}_blocks.{i} has {found} transformer blocks, others of its level {depths[level]}"
                )
    if reasons:
        raise ValueError(
            f"it is a pruned U-Net, as SSD-1B's and Segmind Vega's are, which is not supported ({reasons[0]})"
        )


UNET_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
               "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
UNET_ENDS = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
             "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip


def hugging_face(keys: Collection[str]) -> list[Rule]:
    """Hugging Face U-Net: levels of resnets and attentions -> one list of blocks in, one out."""
    # input blocks a level, with the downsampling
    down = how_many(keys, r"down_blocks\.0\.resnets\.(\d+)\.") + 1
    up = how_many(keys, r"up_blocks\.0\.resnets\.(\d+)\.")
    attended = {match[1] for key in keys if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", key))}

    def resnet(place: str, layer: str) -> list[tuple[str, str]]:
        name, kind = layer.split(".")
        return copy(f"{place}.{UNET_RESNET[name]}.{kind}")

    def upsampler(level: str, kind: str) -> list[tuple[str, str]]:
        return copy(f"output_blocks.{int(level) * up + up - 1}.{2 if level in attended else 1}.conv.{kind}")

    layer = rf"((?:{one_of(UNET_RESNET)})\.(?:weight|bias))"
    return [
        (rf"({one_of(UNET_ENDS)})\.(\w+)", lambda end, kind: copy(f"{UNET_ENDS[end]}.{kind}")),
        (rf"down_blocks\.(\d+)\.resnets\.(\d+)\.{layer}",
         lambda level, i, rest: resnet(f"input_blocks.{int(level) * down + int(i) + 1}.0", rest)),
        (r"down_blocks\.(\d+)\.attentions\.(\d+)\.(.+)",
         lambda level, i, rest: copy(f"input_blocks.{int(level) * down + int(i) + 1}.1.{rest}")),
        (r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(\w+)",
         lambda level, kind: copy(f"input_blocks.{(int(level) + 1) * down}.0.op.{kind}")),
        (rf"mid_block\.resnets\.([01])\.{layer}", lambda i, rest: resnet(f"middle_block.{2 * int(i)}", rest)),
        (r"mid_block\.attentions\.0\.(.+)", lambda rest: copy(f"middle_block.1.{rest}")),
        (rf"up_blocks\.(\d+)\.resnets\.(\d+)\.{layer}",
         lambda level, i, rest: resnet(f"output_blocks.{int(level) * up + int(i)}.0", rest)),
        (r"up_blocks\.(\d+)\.attentions\.(\d+)\.(.+)",
         lambda level, i, rest: copy(f"output_blocks.{int(level) * up + int(i)}.1.{rest}")),
        (r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(\w+)", upsampler),
    ]  # fmt: skip
