"""Latents on disk: what is left of a run when its picture cannot be written, and what `--decode` makes a picture of."""

import json
import secrets
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hybridiff.errors import UsageError
from hybridiff.report import save_picture, write_whole


def save_latents(latents: Tensor, path: Path, seed: int, settings: dict) -> None:
    """Write latents (1, C, h, w), as they leave the last step, with seed and settings as metadata. UsageError where that fails."""
    told = {"seed": str(seed), "settings": json.dumps(settings)}
    content = save({"latents": latents.cpu().contiguous()}, told)
    write_whole(path, lambda temporary: temporary.write_bytes(content))


def save_both(
    image: Tensor, latents: Tensor, picture: Path, kept: Path | None, seed: int, settings: dict
) -> None:
    """Write the picture, and the latents where they are wanted. UsageError where that fails; of a picture that cannot be written the latents are kept."""
    try:
        save_picture(image, picture, seed, settings)
    except UsageError as error:
        raise UsageError(f"{error} {rescue(latents, kept, seed, settings)}") from None
    if kept:
        try:
            save_latents(latents, kept, seed, settings)
        except UsageError as error:
            raise UsageError(f"{error} The picture is in {picture}.") from None


def rescue(latents: Tensor, kept: Path | None, seed: int, settings: dict) -> str:
    """Keep the latents where they were wanted, or else in the folder for temporary files; what came of it and what to do, as a sentence."""
    for place in (kept, None):
        try:
            path = (
                place or Path(tempfile.gettempdir()) / f"hybridiff-{seed}-{secrets.token_hex(4)}.safetensors"
            )
            save_latents(latents, path, seed, settings)
        except (UsageError, OSError) as error:  # OSError: there is no folder for temporary files
            lost = str(error)
        else:
            return f"The latents are kept in {path}: make the picture with --decode {path} and an --out that can be written."
    return f"The latents are lost too: {lost}"


def read_latents(path: Path, channels: int) -> tuple[Tensor, int, dict]:
    """(latents (1, C, h, w) fp32, seed, settings) of a file by `save_latents`. UsageError where it is none, or not for this autoencoder."""
    try:
        with safe_open(path, framework="pt") as file:
            latents, told = file.get_tensor("latents"), file.metadata() or {}
        seed, settings = int(told["seed"]), json.loads(told["settings"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        raise UsageError(f"--decode {path} is no file that --save-latents wrote.") from None
    if (
        latents.ndim != 4
        or latents.shape[:2] != (1, channels)
        or not latents.is_floating_point()
        or not isinstance(settings, dict)
    ):
        raise UsageError(f"--decode {path} holds latents of shape {tuple(latents.shape)}, which this checkpoint's autoencoder of {channels} channels"
                         " cannot decode: give the --weights that they were made with.")  # fmt: skip
    return latents.to(torch.float32), seed, settings
