"""What happened: the report as a table for JSON, and the picture with its settings inside."""

import itertools
import json
import os
import platform
from pathlib import Path
from typing import Callable

import torch
from PIL import ExifTags, Image, PngImagePlugin, features
from torch import Tensor

import hybridiff
from hybridiff.clock import totals
from hybridiff.ending import shown
from hybridiff.errors import UsageError
from hybridiff.pipeline import Request, Result, decoded_together
from hybridiff.switching import MIDDLE, find_switch
from hybridiff.tiles import LARGE

PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # suffix: format
SIDES = {
    "PNG": 2**31 - 1,
    "JPEG": 65_500,
    "WEBP": 16_383,
}  # the most pixels a side, as libjpeg and libwebp have it
JPEG_EXIF = 65_533  # the most bytes that fit in a JPEG's segment


def settings_of(request: Request, weights: str, ranks: int) -> dict:
    """The request as plain values."""
    rule = request.rule
    return {
        "weights": weights, "ranks": ranks, "strategy": request.strategy, "sampler": request.sampler,
        "prompt": request.prompt, "negative_prompt": request.negative_prompt, "steps": request.steps,
        "guidance": request.guidance, "height": request.height, "width": request.width,
        "window": rule.window, "slope": rule.slope, "cap": rule.cap, "interval": rule.interval,
        "start": request.reuse.start, "reused": request.reuse.count,
        "dtype": str(request.dtype).removeprefix("torch."), "tiles": request.tiles, "t5": request.t5,
        "balance": request.balance,
    }  # fmt: skip


def exactness(request: Request, result: Result, ranks: int) -> dict:
    """How much of the picture is, bit for bit on like devices, what `serial` makes: steps from the first on, the decoder, and both in words."""
    stages = [record.stage for record in result.records]
    rounds = (
        request.strategy == "batched" or "keys" in result.bytes_sent
    )  # kernels round by the number of rows
    first = next((step for step, stage in enumerate(stages) if stage in MIDDLE), len(stages))
    steps = 0 if rounds else first
    size = request.height * request.width
    if request.tiles and size > LARGE:
        decoder = "in tiles"
    else:
        decoder = f"by {ranks} ranks together" if decoded_together(request, ranks) else "whole"
    words = (
        "every step"
        if steps == len(stages)
        else f"the first {steps} of {len(stages)} steps"
        if steps
        else "no step"
    )
    words += " as serial computes it" + (
        " (tokens divided among ranks round otherwise)" if "keys" in result.bytes_sent else ""
    )
    words += "" if decoder == "whole" else f"; decoded {decoder}, which rounds otherwise"
    return {"steps": steps, "of": len(stages), "decoder": decoder == "whole", "words": words}


def make_report(request: Request, result: Result, weights: str, ranks: int) -> dict:
    """The report: steps, tau1, tau2 (None where it never switched), seconds, bytes, seed, settings, versions.

    "ranks" holds for every rank of the schedule and every step the measured seconds by what they went into, "seconds" those of
    every process by phase.
    """
    steps = [
        {"stage": r.stage, "discrepancy": r.discrepancy, "slope": r.slope, "seconds": r.seconds}
        for r in result.records
    ]
    spent = totals(result.bars)
    switched = request.strategy == "paper" and any(r.stage == "parallelism" for r in result.records)
    switch = find_switch([r.discrepancy for r in result.records], request.rule) if switched else None
    return {
        "steps": steps,
        "ranks": [
            [spent[rank, record.step] for record in result.records]
            for rank in sorted({bar.rank for bar in result.bars})
        ],
        "tau1": switch.tau1 if switch else None,
        "tau2": switch.tau2 if switch else None,
        "exact": exactness(request, result, ranks),
        "seconds": result.seconds,
        "memory": result.memory,
        "use": result.use,
        "bytes_sent": {"total": sum(result.bytes_sent.values()), "by_operation": result.bytes_sent},
        "seed": request.seed,
        "settings": settings_of(request, weights, ranks),
        "versions": {
            "hybridiff": hybridiff.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def in_use(use: dict) -> list[str]:
    """Lines on how the ranks were used, where it is not the usual way: cuts that were chosen, ranks that idled or hold less than others."""
    lines = [f"cut at {use['cuts']} after timing every unit on each rank"] if use["seconds_of_units"] else []
    if len(set(use["weights"])) > 1:
        lines.append(
            "denoiser's weights held, MB: "
            + ", ".join(f"rank {rank} {held / 1e6:,.1f}" for rank, held in enumerate(use["weights"]))
        )
    return lines + ([use["idle"]] if use["idle"] else [])


def free_name(path: Path) -> Path:
    """The path itself, or the first of name-2, name-3, ... that is not there yet."""
    names = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return path if not path.exists() else next(name for name in names if not name.exists())


def check_writable(path: Path, overwrite: bool) -> None:
    """UsageError unless a file can be made at this path (tried beside it, nothing is left behind)."""
    try:
        if path.is_dir():
            raise UsageError(f"{shown(str(path))} is a directory: give the name of a file.")
        if path.exists() and not overwrite:
            raise UsageError(f"{shown(str(path))} is there already: give --overwrite, or another name.")
        probe = path.with_name(f".{path.name}.{os.getpid()}")
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"{shown(str(path))} cannot be written ({error.strerror}): choose another place."
        ) from None


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file by `write(temporary path)`, then give it its name: it is whole or not there. UsageError where that fails.

    Where the file system can, it has no name before it is whole (open(2), O_TMPFILE), so that not even a kill leaves a part of it.
    """
    temporary, nameless = path.with_name(f".{path.name}.{os.getpid()}"), None
    try:
        try:
            nameless = os.open(path.parent, os.O_TMPFILE | os.O_RDWR, 0o666)
        except (OSError, AttributeError):
            write(temporary)
        else:
            source = Path(f"/proc/self/fd/{nameless}")
            write(source)
            os.link(
                source, temporary, src_dir_fd=nameless, follow_symlinks=True
            )  # the first argument is absolute; a dir_fd makes it linkat(2)
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"{path} could not be written ({error.strerror or error}).") from None
    finally:
        if nameless is not None:
            os.close(nameless)
        temporary.unlink(missing_ok=True)


def picture_format(path: Path) -> str:
    """ "PNG", "JPEG" or "WEBP" by the suffix of a picture's name; PNG where there is none. UsageError where it is another, or cannot be written here."""
    known = PICTURES.get(path.suffix.lower() or ".png")
    if known is None:
        raise UsageError(
            f"--out {shown(str(path))} ends in {shown(path.suffix)}, which is not written here: give a name that ends in {', '.join(PICTURES)}."
        )
    if known != "PNG" and not features.check({"JPEG": "jpg", "WEBP": "webp"}[known]):
        raise UsageError(
            f"--out {shown(str(path))}: the Pillow installed here cannot write {known}; give a name that ends in .png."
        )
    return known


def exif_of(seed: int, settings: dict) -> Image.Exif:
    """Prompt, seed and settings as a JSON object, in ASCII, in the EXIF field ImageDescription."""
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = json.dumps(
        {"prompt": settings["prompt"], "seed": seed, "settings": settings}
    )
    return exif


def check_picture(path: Path, seed: int, settings: dict) -> None:
    """UsageError unless the format of this name can hold a picture of these settings."""
    known = picture_format(path)
    for name in ("height", "width"):
        if settings[name] > SIDES[known]:
            raise UsageError(
                f"--{name} {settings[name]} is too large for a {path.suffix.lower()}, which has at most {SIDES[known]:,} pixels a side: give an --out that ends in .png."
            )
    if known == "JPEG" and len(exif_of(seed, settings).tobytes()) > JPEG_EXIF:
        raise UsageError(
            f"--out {shown(str(path))}: a JPEG has room for 64 KB of prompt and settings, and these are longer; give a name that ends in .png or .webp."
        )


def save_picture(image: Tensor, path: Path, seed: int, settings: dict) -> None:
    """Write (H, W, 3) uint8 in the format that the name says, with prompt, seed and settings: text chunks of a PNG, EXIF of JPEG and WebP. UsageError where that fails."""
    known, picture = picture_format(path), Image.fromarray(image.numpy())
    if known == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("prompt", settings["prompt"])
        info.add_itxt("seed", str(seed))
        info.add_itxt("settings", json.dumps(settings))
        options = {"pnginfo": info}
    else:
        options = {"exif": exif_of(seed, settings), "quality": 95, "subsampling": 0}
    try:
        write_whole(path, lambda temporary: picture.save(temporary, format=known, **options))
    except ValueError as error:  # what the format cannot hold
        raise UsageError(
            f"{path} could not be written as {known} ({error}): give a name that ends in .png."
        ) from None


def save_report(report: dict, folder: Path) -> None:
    """Write folder/report.json."""
    text = json.dumps(report, indent=1) + "\n"
    write_whole(folder / "report.json", lambda temporary: temporary.write_text(text))
