"""From what the user typed to a path: a demo, a file or folder, or the id of a repository on the Hugging Face hub."""

import os
import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath

import models
from models.family import Part
from weights.files import WeightsError
from weights.kinds import known
from weights.tokenizers import TOKENIZER_FILES, hub_cache

DEMOS = ("demo-sdxl", "demo-sd3")
DEMO_FOLDER = Path(__file__).parent / "demo"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def locate(name: str) -> Path:
    """The file or folder meant by `name`; a hub id is fetched. WeightsError if there is none."""
    if name in DEMOS:
        path = DEMO_FOLDER / f"{name}.safetensors"
        if not path.exists():
            raise WeightsError(
                f"{path} is not there: the demo checkpoints belong to the repository; check it out whole."
            )
        return path
    path = Path(os.path.expanduser(name))
    if path.exists():
        return path
    if HUB_ID.fullmatch(name) and not name.endswith((".safetensors", ".ckpt", ".pt", ".bin")):
        return from_hub(name)
    raise WeightsError(
        f"There is no {ascii(name):.200}: give {' or '.join(DEMOS)}, a .safetensors file, a folder in"
        " Hugging Face layout, or a hub id such as stabilityai/stable-diffusion-xl-base-1.0."
    )


def wanted(files: Collection[str]) -> list[str]:
    """Those of a repository's files that make up the model: its Hugging Face layout, else its one .safetensors file.

    Of weights that come in several variants the fp16 one is taken. Empty if the choice is not clear.
    """
    parts = next(
        (parts for parts in all_parts() if any(f.startswith(f"{parts[0].folder}/") for f in files)), None
    )
    if parts is None:
        single = [file for file in files if "/" not in file and file.endswith(".safetensors")]
        return single if len(single) == 1 else []
    chosen = [file for file in files if file in ("model_index.json", "scheduler/scheduler_config.json")]
    for part in parts:
        inside = [file for file in files if str(PurePosixPath(file).parent) == part.folder]
        weights = [
            file for file in inside if re.search(r"/(model|diffusion_pytorch_model)[^/]*\.safetensors$", file)
        ]
        weights = (
            [file for file in weights if ".fp16" in file]
            or [file for file in weights if "." not in file.removesuffix(".safetensors")]
            or weights
        )
        half = any(".fp16" in file for file in weights)
        indexes = [file for file in inside if re.search(r"\.safetensors(\.\w+)?\.index(\.\w+)?\.json$", file)]
        chosen += weights + [file for file in indexes if (".fp16" in file) == half]
        chosen += [file for file in inside if file.endswith("/config.json")]
    tokenizers = {f"{part.tokenizer}/{name}" for part in parts for name in TOKENIZER_FILES}
    return chosen + [file for file in files if file in tokenizers]


def all_parts() -> list[list[Part]]:
    """The parts of every family, the denoiser first."""
    return [list(family.parts.values()) for family in models.FAMILIES]


def from_hub(name: str) -> Path:
    """The local copy of a hub repository, fetched if huggingface_hub is installed."""
    cached = cached_snapshot(name)
    try:
        import huggingface_hub
    except ImportError:
        if cached is not None:
            return cached
        raise WeightsError(
            f"There is no file or folder {name}; if it is a hub id, run `pip install huggingface_hub`"
            f" and try again, or fetch it yourself: `hf download {name} --local-dir DIR`."
        ) from None
    try:
        files = [file.rfilename for file in huggingface_hub.HfApi().model_info(name, timeout=8).siblings]
        chosen = wanted(files)
        if chosen:
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=chosen))
            return folder / chosen[0] if "/" not in chosen[-1] and len(chosen) == 1 else folder
    except (
        Exception
    ) as error:  # no network, no such repository, licence not accepted, disk full: the hub's own types
        if cached is not None:
            return cached
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise WeightsError(
            f"{name} is neither a file or folder here nor could it be fetched from the hub"
            f" ({type(error).__name__}: {reason:.300}); `hf auth login` and a licence accepted on its page may"
            f" help, or fetch it elsewhere by `hf download {name} --local-dir DIR` and give DIR."
        ) from None
    single = [file for file in files if file.endswith(".safetensors")]
    raise WeightsError(
        f"{name} holds no {known(' or ')} model in Hugging Face layout and not exactly one .safetensors file"
        f" ({', '.join(single[:6]) or 'none'}): fetch one with `hf download {name} FILE` and give that."
    )


def cached_snapshot(name: str) -> Path | None:
    """What the hub cache holds of a repository, if anything."""
    home = hub_cache() / ("models--" + name.replace("/", "--"))
    try:
        folder = home / "snapshots" / (home / "refs" / "main").read_text().strip()
        if not folder.is_dir():
            return None
    except OSError:
        return None
    if any((folder / parts[0].folder).is_dir() for parts in all_parts()):
        return folder
    single = sorted(folder.glob("*.safetensors"))
    return single[0] if len(single) == 1 else None
