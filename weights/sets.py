"""Which files of a sub-folder in Hugging Face layout make up its weights: one set of them, and the choice is said."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from weights.files import Entry, WeightsError, read_header, read_json, some

# shards are numbered after the variant (`model.fp16-00001-of-00002`) or, by older versions of diffusers, before it
FILE = re.compile(
    r"(?P<stem>[^.]+?)(?P<old>-\d{5}-of-\d{5})?(?:\.(?P<variant>[^.]+?))?(?P<new>-\d{5}-of-\d{5})?\.safetensors"
)
INDEX = re.compile(
    r"(?P<stem>[^.]+)(?:\.(?P<first>[^.]+))?\.safetensors(?:\.(?P<older>[^.]+))?\.index(?:\.(?P<variant>[^.]+))?\.json"
)
# text encoders follow transformers, which takes a whole file before an index; all others follow diffusers, which
# takes an index before all
TRANSFORMERS, DIFFUSERS = "model", "diffusion_pytorch_model"
ORDER = {"": 0, "fp16": 1, "bf16": 2}  # of the variants


@dataclass
class Variant:
    """The files of one variant of the weights."""

    whole: Path | None = None  # a file that is not numbered
    shards: dict[int, dict[str, Path]] = field(default_factory=dict)  # number of shards -> which -> file
    index: Path | None = None

    def files(self) -> list[Path]:
        """All files with weights."""
        numbered = [file for which in self.shards.values() for file in which.values()]
        return [self.whole, *numbered] if self.whole else numbered


def variants(folder: Path, text: bool) -> tuple[dict[str, Variant], list[Path]]:
    """The weights of a sub-folder by variant ("" first), under the usual name or else under any one name; the files under other names.

    WeightsError where there are several names, none of them usual.
    """
    found: dict[str, dict[str, Variant]] = {}  # stem -> variant
    for file in sorted(folder.glob("*.safetensors")):
        if match := FILE.fullmatch(file.name):
            variant = found.setdefault(match["stem"], {}).setdefault(match["variant"] or "", Variant())
            if place := match["old"] or match["new"]:
                number, count = place.removeprefix("-").split("-of-")
                variant.shards.setdefault(int(count), {})[number] = file
            else:
                variant.whole = file
    for file in sorted(folder.glob("*.index*.json")):
        if match := INDEX.fullmatch(file.name):
            name = match["variant"] or match["older"] or match["first"] or ""
            found.setdefault(match["stem"], {}).setdefault(name, Variant()).index = file
    usual = TRANSFORMERS if text else DIFFUSERS
    filled = [
        stem
        for stem, those in found.items()
        if any(variant.files() or (variant.index and stem == usual) for variant in those.values())
    ]
    stem = min(filled, key=lambda stem: (stem != usual, stem not in (DIFFUSERS, TRANSFORMERS)), default=None)
    others = [
        file for other in filled if other != stem for one in found[other].values() for file in one.files()
    ]
    if others and stem not in (DIFFUSERS, TRANSFORMERS):
        raise WeightsError(
            f"{folder} holds weights under several names ({some(sorted(f'{stem}.safetensors' for stem in filled))}), and"
            f" nothing says which count: keep one, as {usual}.safetensors."
        )
    return dict(
        sorted(found.get(stem, {}).items(), key=lambda item: (ORDER.get(item[0], 3), item[0]))
    ), others


def chosen(folder: Path, text: bool, variant: Variant) -> list[Path]:
    """The files of a variant that count; WeightsError where some are missing, or nothing tells which set counts."""
    if variant.index and not (text and variant.whole):
        return indexed(variant.index)
    if variant.whole:
        return [variant.whole]
    complete = {count: which for count, which in variant.shards.items() if len(which) == count}
    if len(complete) > 1:
        raise WeightsError(
            f"{folder} holds sets of {' and of '.join(map(str, complete))} shards and no index that says which counts:"
            " delete the old one."
        )
    for which in complete.values():
        return list(which.values())
    count, which = next(iter(variant.shards.items()))
    raise WeightsError(f"{folder} holds {len(which)} of {count} shards: fetch the others.")


def indexed(index: Path) -> list[Path]:
    """The files that an index names; WeightsError where it is no index or one of them is missing."""
    listed = read_json(index).get("weight_map")
    names = list(listed.values()) if isinstance(listed, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise WeightsError(
            f"{index} does not list the files beside it that hold the weights: fetch it again."
        )
    names = sorted(set(names))
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        raise WeightsError(
            f"{index.parent} holds {len(names) - len(missing)} of the {len(names)} files that {index.name} names as its"
            f" shards: fetch the others ({some(missing)})."
        )
    return [index.parent / name for name in names]


def folder_entries(folder: Path, text: bool) -> tuple[dict[str, Entry], list[str]]:
    """The tensors of a sub-folder (`text`: of a text encoder), and a remark where there was a choice.

    The plain files are taken, else the fp16 or bf16 variant. A variant that cannot be used, such as one with a pointer of Git LFS
    or without the files that its index names, makes way for the next. Shards are put together.
    """
    found, others = variants(folder, text)
    if not found:
        pickles = any(folder.glob("*.bin")) or any(folder.glob("*.ckpt"))
        raise WeightsError(
            f"{folder} holds no .safetensors file"
            + (", only pickles, which are never opened here." if pickles else ".")
        )
    problems = []
    for name, variant in found.items():
        try:
            files = chosen(folder, text, variant)
            entries = together(files)
        except WeightsError as problem:
            problems.append(problem)
            continue
        if problems:
            problem = str(problems[0]).rstrip(".")
            return entries, [f"{problem}; the variant {name or 'without a name'} beside it is taken."]
        left = sorted({*others, *(file for other in found.values() for file in other.files())} - set(files))
        if not left:
            return entries, []
        taken = f"{folder} holds several sets of weights: {listed(files)} is taken, {listed(left)} is not"
        why = variant.index if variant.index and files != [variant.whole] else None
        return entries, [f"{taken}, as {why.name} says." if why else f"{taken}."]
    raise problems[0]


def listed(files: list[Path]) -> str:
    """The name of the first file, and how many there are besides."""
    return some([files[0].name]) + (f" (and {len(files) - 1} more)" if len(files) > 1 else "")


def together(files: Iterable[Path]) -> dict[str, Entry]:
    """The tensors of all shards."""
    entries: dict[str, Entry] = {}
    for file in files:
        found, _ = read_header(file)
        if twice := entries.keys() & found.keys():
            raise WeightsError(
                f"{file} holds tensors that another file beside it holds too: {some(sorted(twice))}."
            )
        entries |= found
    return entries
