"""What SDXL and SD3 share: CLIP-L and bigG, and how files with one text encoder are told apart."""

from collections.abc import Mapping

from models.clip import CLIPConfig
from models.family import Configs

FIXED = {"layer_norm_eps": 1e-5}  # of a CLIP's config.json
ENCODER_HOME = "https://huggingface.co/stabilityai/stable-diffusion-3-medium/tree/main/text_encoders"


def text_encoder(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The text encoder that a file holds, by names and shapes: "clip_l", "clip_g" or "t5"; None for anything else."""
    words = "embeddings.token_embedding.weight"
    table = shapes.get(f"text_model.{words}", shapes.get(words))
    if any(key.startswith("encoder.block.") for key in shapes):
        return "t5"
    if any(key.startswith("transformer.resblocks.") for key in shapes):
        return "clip_g"
    if table is None:
        return None
    by_projection = "clip_g" if "text_projection.weight" in shapes else "clip_l"
    return {768: "clip_l", 1280: "clip_g"}.get(table[-1] if table else 0, by_projection)


def positions_misfit(configs: Configs) -> list[str]:
    """A sentence where the two towers read rows of different lengths."""
    clip_l, clip_g = configs.get("clip_l"), configs.get("clip_g")
    if clip_l is None or clip_g is None or clip_l.positions == clip_g.positions:
        return []
    return [f"its CLIP encoders have {clip_l.positions} and {clip_g.positions} positions"]


def pooled_width(config: CLIPConfig) -> int:
    """Width of the pooled state."""
    return config.projection or config.width
