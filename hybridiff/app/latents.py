"""Latents on disk: what is left of a run when its picture cannot be written, and what `--decode` makes a picture of."""

import json
import secrets
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hybridiff.app.files import save_picture, write_whole
from hybridiff.errors import UsageError


def save_latents(latents: Tensor, path: Path, seed: int, settings: dict, overwrite: bool = True) -> None:
    """Write latents (1, C, h, w), as they leave the last step, with seed and settings as metadata. UsageError where that fails."""
    metadata = {"seed": str(seed), "settings": json.dumps(settings)}
    content = save({"latents": latents.cpu().contiguous()}, metadata)
    write_whole(path, lambda temporary: temporary.write_bytes(content), overwrite)


def save_both(
    image: Tensor,
    latents: Tensor,
    picture: Path,
    kept: Path | None,
    seed: int,
    settings: dict,
    overwrite: bool = False,
    **how,
) -> Path:
    """Write the latents where they are wanted, then the picture, as save_picture does; returns the picture's path.

    The picture comes last, so that where it is the latents are too. UsageError where one fails; the other is written all the
    same, and the latents are kept somewhere, which the sentence tells.
    """
    details = seed, settings, overwrite
    failed, where = None, kept
    if kept:
        try:
            save_latents(latents, kept, *details)
        except UsageError as error:
            failed = error
    try:
        picture = save_picture(image, picture, *details, **how)
    except UsageError as error:
        where, words = (
            (kept, f"The latents are kept in {kept}.") if kept and not failed else rescue(latents, *details)
        )
        advice = f" Make the picture with --decode {where} and an --out that can be written." if where else ""
        raise UsageError(f"{error} {words}{advice}") from None
    if failed:
        raise UsageError(f"{failed} The picture is in {picture}. {rescue(latents, *details)[1]}")
    return picture


def rescue(latents: Tensor, seed: int, settings: dict, overwrite: bool = False) -> tuple[Path | None, str]:
    """Keep the latents in the folder for temporary files; (where, None if they are lost; that in a sentence)."""
    try:
        path = Path(tempfile.gettempdir()) / f"hybridiff-{seed}-{secrets.token_hex(4)}.safetensors"
        save_latents(latents, path, seed, settings, overwrite)
    except (UsageError, OSError) as error:  # OSError: there is no folder for temporary files
        return None, f"The latents are lost too: {error}"
    return path, f"The latents are kept in {path}."


def read_latents(path: Path, channels: int) -> tuple[Tensor, int, dict]:
    """(latents (1, C, h, w) fp32, seed, settings) of a file by `save_latents`. UsageError where it is none, or not for this autoencoder."""
    try:
        with safe_open(path, framework="pt") as file:
            latents, metadata = file.get_tensor("latents"), file.metadata() or {}
        seed, settings = int(metadata["seed"]), json.loads(metadata["settings"])
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
