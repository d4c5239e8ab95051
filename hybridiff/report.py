"""What happened: the report as a table for JSON, and the picture with its settings inside."""

import errno
import hashlib
import itertools
import json
import os
import platform
import secrets
from pathlib import Path
from typing import Callable

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

import hybridiff
from hybridiff.clock import totals
from hybridiff.ending import shown
from hybridiff.errors import NameTaken, UsageError
from hybridiff.pipeline import Request, Result, decoded_together
from hybridiff.switching import find_switch
from hybridiff.tiles import LARGE

PICTURE = Path("picture.png")  # where a picture goes that is given no name
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # of file systems such as exFAT


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
    steps = 0 if rounds else stages.index("parallelism") if "parallelism" in stages else len(stages)
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
    return path if not os.path.lexists(path) else next(name for name in names if not os.path.lexists(name))


def check_writable(path: Path, overwrite: bool) -> None:
    """UsageError unless a file can be made at this path (tried beside it, nothing is left behind)."""
    try:
        if path.is_dir():
            raise UsageError(f"{shown(str(path))} is a directory: give the name of a file.")
        if os.path.lexists(path) and not overwrite:
            raise UsageError(f"{shown(str(path))} is there already: give --overwrite, or another name.")
        probe = beside(path)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"{shown(str(path))} cannot be written ({error.strerror}): choose another place."
        ) from None


def beside(path: Path) -> Path:
    """A hidden name in the same folder that nobody else has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def write_whole(path: Path, write: Callable[[Path], object], overwrite: bool = True) -> None:
    """Write a file by `write(temporary path)`, then give it its name: it is whole or not there. UsageError where that fails.

    Where the file system can, it has no name before it is whole (open(2), O_TMPFILE), so that not even a kill leaves a part of it.
    Without `overwrite` a file that has come under this name meanwhile stays as it is, and NameTaken is raised.
    """
    temporary, nameless = beside(path), None
    try:
        try:
            nameless = os.open(path.parent, os.O_TMPFILE | os.O_RDWR, 0o666)
        except (OSError, AttributeError):
            source = temporary
        else:
            source = Path(f"/proc/self/fd/{nameless}")
        write(source)
        if not overwrite:
            take_name(source, path, nameless)
            return
        if nameless is not None:
            link(source, temporary, nameless)
        os.replace(temporary, path)
    except FileExistsError:
        raise NameTaken(f"{path} was made by another run meanwhile, and is left as it is.") from None
    except OSError as error:
        raise UsageError(f"{path} could not be written ({error.strerror or error}).") from None
    finally:
        if nameless is not None:
            os.close(nameless)
        temporary.unlink(missing_ok=True)


def link(source: Path, path: Path, nameless: int | None) -> None:
    """Give a file another name, or its first where it is `nameless` (its descriptor). FileExistsError where there is one of that name."""
    if nameless is None:
        os.link(source, path)
    else:
        os.link(
            source, path, src_dir_fd=nameless, follow_symlinks=True
        )  # the first argument is absolute; a dir_fd makes it linkat(2)


def take_name(source: Path, path: Path, nameless: int | None) -> None:
    """Give a whole file its name. FileExistsError where there is a file of that name, whenever it came."""
    try:
        link(source, path, nameless)
    except OSError as error:
        if error.errno not in NO_LINKS or nameless is not None:
            raise
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # an empty file keeps the name
        os.replace(source, path)


def this_run() -> str | None:
    """What tells this run of torchrun from all others, the same in each of its attempts; None where it restarts no ranks.

    torchrun's own name of a run is "none" unless one is given or made, so the folder of its logs, which is always new, is taken too.
    """
    name, errors = (os.environ.get(f"TORCHELASTIC_{what}", "") for what in ("RUN_ID", "ERROR_FILE"))
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0" or (name in ("", "none") and not errors):
        return None
    logs = Path(errors).parents[2:3]  # LOGS/attempt_0/0/error.json
    return hashlib.sha256(f"{name} {logs and logs[0]}".encode()).hexdigest()[:16]


def save_picture(
    image: Tensor,
    path: Path,
    seed: int,
    settings: dict,
    overwrite: bool = True,
    numbered: bool = False,
    run: str | None = None,
) -> Path:
    """Write (H, W, 3) uint8 as PNG with prompt, seed, settings and, where it is given, the run as text metadata; returns its path.

    Without `overwrite` NameTaken where the name is no longer free; with `numbered` the next number that is.
    """
    info = PngImagePlugin.PngInfo()
    info.add_itxt("prompt", settings["prompt"])
    info.add_itxt("seed", str(seed))
    info.add_itxt("settings", json.dumps(settings))
    if run:
        info.add_itxt("run", run)
    picture = Image.fromarray(image.numpy())
    while True:
        try:
            write_whole(
                path, lambda temporary: picture.save(temporary, format="PNG", pnginfo=info), overwrite
            )
            return path
        except NameTaken:
            if not numbered:
                raise
            path = free_name(PICTURE)


def read_text(path: Path) -> dict[str, str]:
    """The text metadata of a whole PNG of any size, without decoding it; empty where the file is none."""
    try:
        with PngImagePlugin.PngImageFile(path) as picture:
            told = {name: str(value) for name, value in picture.info.items() if isinstance(value, str)}
            picture.verify()  # the checksums, to the end of the file
        return told
    except Exception:  # Pillow raises many kinds for a file that is none or is damaged
        return {}


def save_report(report: dict, folder: Path, overwrite: bool = True) -> None:
    """Write folder/report.json."""
    text = json.dumps(report, indent=1) + "\n"
    write_whole(folder / "report.json", lambda temporary: temporary.write_text(text), overwrite)
