"""Writes a demo checkpoint: all parts in one fp16 safetensors file, in the official single-file layout."""

import json
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from weights.demo.denoisers import MMDIT, SIDE, UNET
from weights.demo.loop import write_safetensors
from weights.demo.text_encoders import CLIP_SIZES, LENGTH

GUIDANCE = {"sdxl": 5.0, "sd3": 3.0}
PROMPT = "a large red circle left of a small blue square on a yellow background"
TO_OPENCLIP = (  # transformers naming -> OpenCLIP naming, for what is more than a prefix (see `openclip`)
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    (".self_attn.out_proj.", ".attn.out_proj."),
)


def openclip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """bigG in OpenCLIP's names: q, k, v fused to `in_proj`, the projection transposed, the unused logit_scale added."""
    renamed: dict[str, Tensor] = {"logit_scale": torch.tensor(1.0)}
    for name, tensor in tensors.items():
        if name == "text_projection.weight":
            renamed["text_projection"] = tensor.T
        elif match := re.fullmatch(
            r"text_model\.encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name
        ):
            parts = [tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            renamed[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"] = torch.cat(parts)
        elif not re.search(r"\.[kv]_proj\.", name):
            for old, new in TO_OPENCLIP:
                name = name.replace(old, new)
            renamed[name] = tensor
    return renamed


def single_file(family: str, model: nn.Module, autoencoder: nn.Module) -> dict[str, Tensor]:
    """Every tensor under its official single-file name."""
    parts = {
        "model.diffusion_model.": model.denoiser.state_dict(),
        "first_stage_model.": autoencoder.state_dict(),
    }
    if family == "sdxl":
        parts["conditioner.embedders.0.transformer."] = model.encoders.clip_l.state_dict()
        parts["conditioner.embedders.1.model."] = openclip(model.encoders.clip_g.state_dict())
    else:
        parts["text_encoders.clip_l.transformer."] = model.encoders.clip_l.state_dict()
        parts["text_encoders.clip_g.transformer."] = model.encoders.clip_g.state_dict()
        t5 = model.encoders.t5.state_dict()
        parts["text_encoders.t5xxl.transformer."] = t5 | {
            "encoder.embed_tokens.weight": t5["shared.weight"].clone()
        }
    return {prefix + name: tensor for prefix, tensors in parts.items() for name, tensor in tensors.items()}


def config(family: str, vae_groups: int, scaling: float, shift: float) -> dict:
    """What the tensors cannot tell, for the metadata entry `hybridiff.config`."""
    clip_heads = CLIP_SIZES["width"] // CLIP_SIZES["heads"]
    if family == "sdxl":
        width = UNET["channels"] * UNET["multipliers"][1] // UNET["heads"][1]
        own = {"unet": {"head_width": width, "groups": UNET["groups"]}}
    else:
        own = {"mmdit": {"head_width": MMDIT["width"] // MMDIT["heads"]}, "t5_length": LENGTH}
    return own | {
        "vae": {"groups": vae_groups, "scaling": scaling, "shift": shift},
        "clip_l": {"head_width": clip_heads, "activation": "quick_gelu"},
        "clip_g": {"head_width": clip_heads, "activation": "gelu"},
        "defaults": {"prompt": PROMPT, "height": SIDE, "width": SIDE, "guidance": GUIDANCE[family]},
    }


def export(
    family: str, model: nn.Module, autoencoder: nn.Module, scaling: float, shift: float, folder: Path
) -> Path:
    """Writes demo-<family>.safetensors (fp16) into the folder and returns its path."""
    tensors = {
        name: tensor.detach().half() for name, tensor in single_file(family, model, autoencoder).items()
    }
    known = config(family, autoencoder.config.groups, scaling, shift)
    path = folder / f"demo-{family}.safetensors"
    write_safetensors(tensors, path, {"hybridiff.config": json.dumps(known), "license": "Apache-2.0"})
    return path
