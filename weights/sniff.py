"""Configs of the networks, read off official names and shapes alone.

What shapes cannot tell follows the family's official rule, unless `given` says otherwise: a part's table in the
metadata entry `hybridiff.config`, or what `given_by_json` takes from a Hugging Face config.json. A WeightsError says
which tensor is missing or has an impossible shape; whether all tensors fit is for weights/check.py.
"""

import math
from collections.abc import Mapping

from models.autoencoder import AutoencoderConfig
from models.clip import ACTIVATIONS, CLIPConfig
from models.mmdit import MMDiTConfig
from models.t5 import T5Config
from models.unet import UNetConfig
from weights.files import WeightsError
from weights.layouts import numbers

HEAD_WIDTH = 64  # of SDXL, SD3, CLIP-L and bigG
V1_HEADS = 8  # SD 1.5: at every level
SCALING = {"sdxl": (0.13025, 0.0), "sd3": (1.5305, 0.0609)}  # of the latents: factor, shift
LAYERS = {"clip": {768: 12, 1280: 32}, "t5": {4096: 24}}  # of the official text encoders, by width

Shapes = Mapping[str, tuple[int, ...]]
JSON_NAMES = {  # field of a Hugging Face config.json -> what it is here
    "unet": {"attention_head_dim": "heads", "num_attention_heads": "heads", "norm_num_groups": "groups"},
    "mmdit": {"attention_head_dim": "head_width"},
    "vae": {"norm_num_groups": "groups", "scaling_factor": "scaling", "shift_factor": "shift"},
    "clip": {"num_attention_heads": "heads", "hidden_act": "activation", "num_hidden_layers": "layers"},
    "t5": {"relative_attention_max_distance": "max_distance", "num_layers": "layers"},
}


def given_by_json(kind: str, config: Mapping) -> dict:
    """What a Hugging Face config.json tells beyond the shapes; null entries tell nothing.

    The `attention_head_dim` of a U-Net is the number of its heads (diffusers, UNet2DConditionModel).
    """
    return {
        ours: config[theirs] for theirs, ours in JSON_NAMES[kind].items() if config.get(theirs) is not None
    }


def size(shapes: Shapes, name: str, dim: int, rank: int) -> int:
    """One dimension of a tensor that must be there with that many dimensions, none of them zero."""
    shape = shapes.get(name)
    if shape is None:
        raise WeightsError(f"tensor {name} is missing")
    if len(shape) != rank or min(shape) < 1:
        raise WeightsError(f"tensor {name} has the impossible shape {list(shape)}")
    return shape[dim]


def divide(whole: int, part: int, what: str) -> int:
    """Exact division; WeightsError where it leaves a rest."""
    if part < 1 or whole < part or whole % part:
        raise WeightsError(f"{what}: {whole} cannot be divided into {part}")
    return whole // part


def number(given: Mapping, name: str, default: float, kind: type = int) -> float:
    """A positive whole number (or any not huge one, kind=float) from what is given, else the default."""
    value = given.get(name, default)
    fits = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not fits or not (1 if kind is int else -1e9) <= value <= 1e9:
        raise WeightsError(f"the configuration gives {name} = {value!r:.50}")
    return kind(value)


def heads(given: Mapping, width: int, head_width: int = HEAD_WIDTH) -> int:
    """Number of attention heads of that width; `given` may have `heads` or `head_width`."""
    if "heads" in given:
        count = number(given, "heads", 1)
        divide(width, count, "attention heads")
        return count
    return divide(width, number(given, "head_width", head_width), "attention heads")


def unet(shapes: Shapes, given: Mapping = {}) -> UNetConfig:
    """Sizes of a U-Net."""
    channels = (
        divide(size(shapes, "input_blocks.0.0.weight", 0, 4), 2, "rows of input_blocks.0.0.weight") * 2
    )  # half cosines, half sines
    count = numbers(shapes, r"input_blocks\.(\d+)\.")
    closing = [
        i for i in range(count) if f"input_blocks.{i}.0.op.weight" in shapes
    ]  # the downsampling blocks
    levels, blocks = len(closing) + 1, (closing[0] if closing else count) - 1
    if blocks < 1 or count != levels * (blocks + 1):
        raise WeightsError(f"{count} input blocks with {len(closing)} downsamplings do not make up a U-Net")
    firsts = [1 + level * (blocks + 1) for level in range(levels)]
    widths = [size(shapes, f"input_blocks.{i}.0.in_layers.2.weight", 0, 4) for i in firsts]
    depths = [numbers(shapes, rf"input_blocks\.{i}\.1\.transformer_blocks\.(\d+)\.") for i in firsts]
    middle_depth = numbers(shapes, r"middle_block\.1\.transformer_blocks\.(\d+)\.")
    places = [f"input_blocks.{i}.1" for i, depth in zip(firsts, depths) if depth] + ["middle_block.1"]
    context_width = size(shapes, f"{places[0]}.transformer_blocks.0.attn2.to_k.weight", 1, 2)
    linear = len(shapes.get(f"{places[0]}.proj_in.weight", ())) == 2

    def level_heads(level: int, width: int) -> int:
        listed = given.get("heads")
        if not depths[level] and not (middle_depth and level == levels - 1):
            return max(1, width // HEAD_WIDTH)  # no attention here
        if isinstance(listed, (list, tuple)):
            if len(listed) != levels:
                raise WeightsError(f"the configuration gives heads = {listed!r:.50} for {levels} levels")
            return heads({"heads": listed[level]}, width)
        if listed is None and "head_width" not in given and not linear:
            return heads({"heads": V1_HEADS}, width)
        return heads(given, width)

    check_whole(shapes, count, blocks, depths)
    vector = "label_emb.0.0.weight"
    return UNetConfig(
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
    """WeightsError where a U-Net was pruned block by block, so that its levels no longer tell its sizes."""
    reasons = [] if any(name.startswith("middle_block.") for name in shapes) else ["it has no middle block"]
    for half in ("input", "output"):
        for i in range(count):
            level = i // (blocks + 1) if half == "input" else len(depths) - 1 - i // (blocks + 1)
            if half == "input" and i % (blocks + 1) == 0:
                continue  # the first convolution, or a downsampling
            found = numbers(shapes, rf"{half}_blocks\.{i}\.1\.transformer_blocks\.(\d+)\.")
            if found != depths[level]:
                reasons.append(
                    f"{half}_blocks.{i} has {found} transformer blocks, others of its level {depths[level]}"
                )
    if reasons:
        raise WeightsError(
            f"it is a pruned U-Net, as SSD-1B's and Segmind Vega's are, which is not run here ({reasons[0]})"
        )


def groups(given: Mapping, channels: int) -> int:
    """Groups of the group norms, which must divide the narrowest level."""
    count = number(given, "groups", 32)
    divide(channels, count, "norm groups")
    return count


def mmdit(shapes: Shapes, given: Mapping = {}) -> MMDiTConfig:
    """Sizes of an MMDiT; query norms, where there are any, tell the head width."""
    width = size(shapes, "x_embedder.proj.weight", 0, 4)
    query_norm = "joint_blocks.0.x_block.attn.ln_q.weight"
    head_width = size(shapes, query_norm, 0, 1) if query_norm in shapes else HEAD_WIDTH
    places = size(shapes, "pos_embed", 1, 3)
    if math.isqrt(places) ** 2 != places:
        raise WeightsError(f"pos_embed holds {places} positions, which is no square")
    return MMDiTConfig(
        latent_channels=size(shapes, "x_embedder.proj.weight", 1, 4),
        patch=size(shapes, "x_embedder.proj.weight", 2, 4),
        width=width,
        depth=at_least_one(numbers(shapes, r"joint_blocks\.(\d+)\."), "joint blocks"),
        heads=heads(given, width, head_width),
        context_width=size(shapes, "context_embedder.weight", 1, 2),
        pooled_width=size(shapes, "y_embedder.mlp.0.weight", 1, 2),
        positions=math.isqrt(places),
        qk_norm=query_norm in shapes,
        dual_blocks=numbers(shapes, r"joint_blocks\.(\d+)\.x_block\.attn2\."),
    )


def at_least_one(count: int, what: str) -> int:
    """The count itself; WeightsError if it is zero."""
    if count < 1:
        raise WeightsError(f"there are no {what}")
    return count


def autoencoder(shapes: Shapes, family: str, given: Mapping = {}) -> AutoencoderConfig:
    """Sizes of an autoencoder; the family ("sdxl" or "sd3") tells scaling and shift."""
    scaling, shift = SCALING[family]
    channels = size(shapes, "encoder.conv_in.weight", 0, 4)
    levels = at_least_one(numbers(shapes, r"encoder\.down\.(\d+)\."), "levels in the encoder")
    widths = [size(shapes, f"encoder.down.{level}.block.0.conv1.weight", 0, 4) for level in range(levels)]
    scaling = number(given, "scaling", scaling, float)
    if scaling == 0:
        raise WeightsError("the configuration gives scaling = 0")
    return AutoencoderConfig(
        channels=channels,
        multipliers=tuple(divide(width, channels, "channels of a level") for width in widths),
        blocks=at_least_one(
            numbers(shapes, r"encoder\.down\.0\.block\.(\d+)\."), "residual blocks in the encoder"
        ),
        latent_channels=size(shapes, "decoder.conv_in.weight", 1, 4),
        quant_convs="post_quant_conv.weight" in shapes,
        groups=groups(given, channels),
        scaling=scaling,
        shift=number(given, "shift", shift, float),
    )


def layers(found: int, kind: str, width: int, given: Mapping, optional: int = 0) -> int:
    """Number of layers; WeightsError if the file holds fewer or more than its config or its official width tells.

    A file that lacks some of the last layers would still make up a network. `optional` of them may be missing.
    """
    told = number(given, "layers", LAYERS[kind].get(width, at_least_one(found, "layers in the text encoder")))
    if not told - optional <= found <= told:
        raise WeightsError(f"{found} layers are there where {told} are expected")
    return told


def clip(shapes: Shapes, activation: str, given: Mapping = {}, unused: int = 0) -> CLIPConfig:
    """Sizes of a CLIP text tower; the family's activation is "quick_gelu" for CLIP-L, "gelu" for bigG.

    `unused`: so many last layers may be missing (SDXL takes the input of CLIP-L's last layer; some files leave that
    layer out).
    """
    table = "text_model.embeddings.token_embedding.weight"
    width = size(shapes, table, 1, 2)
    activation = given.get("activation", activation)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise WeightsError(
            f"the configuration gives activation = {activation!r:.50}, known are {list(ACTIVATIONS)}"
        )
    projection = "text_projection.weight"
    positions = size(shapes, "text_model.embeddings.position_embedding.weight", 0, 2)
    if positions < 3:
        raise WeightsError(f"{positions} positions leave no room for text")
    found = numbers(shapes, r"text_model\.encoder\.layers\.(\d+)\.")
    return CLIPConfig(
        vocabulary=size(shapes, table, 0, 2),
        positions=positions,
        width=width,
        layers=layers(found, "clip", width, given, unused),
        heads=heads(given, width),
        mlp_width=size(shapes, "text_model.encoder.layers.0.mlp.fc1.weight", 0, 2),
        activation=activation,
        projection=size(shapes, projection, 0, 2) if projection in shapes else None,
    )


def t5(shapes: Shapes, given: Mapping = {}) -> T5Config:
    """Sizes of a T5 encoder."""
    first, width = "encoder.block.0.layer.0.SelfAttention", size(shapes, "shared.weight", 1, 2)
    count = size(shapes, f"{first}.relative_attention_bias.weight", 1, 2)
    buckets = size(shapes, f"{first}.relative_attention_bias.weight", 0, 2)
    max_distance = number(given, "max_distance", 128)
    if buckets < 4 or max_distance <= buckets // 4:
        raise WeightsError(f"{buckets} position buckets up to a distance of {max_distance} are impossible")
    return T5Config(
        vocabulary=size(shapes, "shared.weight", 0, 2),
        width=width,
        layers=layers(numbers(shapes, r"encoder\.block\.(\d+)\."), "t5", width, given),
        heads=count,
        head_width=divide(size(shapes, f"{first}.q.weight", 0, 2), count, "attention heads"),
        mlp_width=size(shapes, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 0, 2),
        buckets=buckets,
        max_distance=max_distance,
    )
