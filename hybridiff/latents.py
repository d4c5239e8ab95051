"""Latents on disk: what is left of a run when its picture cannot be written, and what `--decode` makes a picture of."""

import json
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hybridiff.errors import UsageError
from hybridiff.report import write_whole


def save_latents(latents: Tensor, path: Path, seed: int, settings: dict) -> None:
    """Write latents (1, C, h, w), as they leave the last step, with seed and settings as metadata. UsageError where that fails."""
    told = {"seed": str(seed), "settings": json.dumps(settings)}
    write_whole(path, lambda temporary: save_file({"latents": latents.cpu().contiguous()}, temporary, told))


def rescue(latents: Tensor, seed: int, settings: dict) -> str:
    """Keep the latents in the folder for temporary files, since the picture could not be written; what to do, as a sentence."""
    with tempfile.NamedTemporaryFile(prefix=f"hybridiff-{seed}-", suffix=".safetensors", delete=False) as file:
        path = Path(file.name)
    try:
        save_latents(latents, path, seed, settings)
    except UsageError as error:
        path.unlink(missing_ok=True)
        return f"The latents are lost too: {error}"
    return f"The latents are kept in {path}: make the picture with --decode {path} and an --out that can be written."


def read_latents(path: Path, channels: int) -> tuple[Tensor, int, dict]:
    """(latents (1, C, h, w) fp32, seed, settings) of a file by `save_latents`. UsageError where it is none, or not for this autoencoder."""
    try:
        with safe_open(path, framework="pt") as file:
            latents, told = file.get_tensor("latents"), file.metadata() or {}
        seed, settings = int(told["seed"]), json.loads(told["settings"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        raise UsageError(f"--decode {path} is no file that --save-latents wrote.") from None
    if latents.ndim != 4 or latents.shape[:2] != (1, channels) or not latents.is_floating_point() or not isinstance(settings, dict):
        raise UsageError(f"--decode {path} holds latents of shape {tuple(latents.shape)}, which this checkpoint's autoencoder of {channels} channels"
                         " cannot decode: give the --weights that they were made with.")  # fmt: skip
    return latents.to(torch.float32), seed, settings
