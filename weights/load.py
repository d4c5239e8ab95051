"""`open_checkpoint`: from a name to a checkpoint, with text encoders from files of their own. Reads headers only."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import models
from models.family import Family
from weights.checkpoint import Checkpoint
from weights.files import WeightsError, read_header, some
from weights.find import locate
from weights.names import surplus
from weights.parts import FoundPart, own_config, read_contents, refuse_quantised, table, used

__all__ = ["Checkpoint", "WeightsError", "open_checkpoint"]


def open_checkpoint(name: str, text_encoders: Sequence[str] = (), t5_file: str | None = None) -> Checkpoint:
    """Recognises and checks a checkpoint: "demo-sdxl", "demo-sd3", a .safetensors file, a folder or a hub id.

    `text_encoders`: files with one text encoder each (clip_l, clip_g, t5xxl), which take the place of the checkpoint's;
    those that a family keeps in files of their own are looked for beside a single file. `t5_file`: T5's spiece.model.
    Raises WeightsError, a ValueError. Reads headers only.
    """
    try:
        path = locate(name)
        given: dict[str, Path] = {}
        for file in (Path(os.path.expanduser(file)) for file in text_encoders):
            part = part_in(file)
            if part in given:
                raise WeightsError(
                    f"{given[part]} and {file} are both a {part} text encoder: give one of them."
                )
            given[part] = file
        contents = read_contents(path, without=given)
        family, parts = contents.family, dict(contents.parts)
        for part, file in given.items():
            if part not in family.parts:
                raise WeightsError(f"{file} is a {part} text encoder, which {family.title} does not have.")
            parts[part] = read_encoder(file, part, family)
        remarks = [*contents.remarks, *(f"{part} from {file}" for part, file in given.items())]
        checkpoint = Checkpoint(replace(contents, parts=parts, remarks=remarks), t5_file)
        if family.beside and contents.layout == "single":
            look_beside(checkpoint)
        return checkpoint
    except OSError as error:
        raise WeightsError(f"{ascii(name):.200} cannot be read: {error.strerror or error}.") from None
    except WeightsError:
        raise
    except ValueError as error:  # a path with a null byte
        raise WeightsError(f"{ascii(name):.200} cannot be read: {error}.") from None


def part_in(file: Path) -> str:
    """Name of the text encoder that a file holds and nothing else."""
    entries, _ = read_header(file)
    refuse_quantised(file, entries)
    shapes = {key: entry.shape for key, entry in entries.items()}
    found = (family.text_encoder(shapes) for family in models.FAMILIES)
    part = next((part for part in found if part), None)
    if part is None:
        raise WeightsError(
            f"{file} is not a text encoder (CLIP-L, bigG or T5); its tensors: {some(list(entries))}."
        )
    return part


def read_encoder(file: Path, name: str, family: Family) -> FoundPart:
    """The text encoder of a family in a file of its own."""
    entries, metadata = read_header(file)
    part = family.parts[name]
    given = table(file, own_config(file, metadata), part.table or name)
    return FoundPart(file, used(part, entries), given)


def look_beside(checkpoint: Checkpoint) -> None:
    """Text encoders that a single file lacks, from the files beside it: those that fit together, and why others do not."""
    model = checkpoint.model
    needed = [name for name, part in model.parts.items() if part.tokenizer and name not in checkpoint.checked]
    found, problems = read_beside(checkpoint.path, needed, model)
    checkpoint.problems |= problems
    optional = {name: model.parts[name].optional for name in needed}
    for group in (False, True):  # those that are needed must fit each other, the others the denoiser alone
        checkpoint.take({name: found[name] for name in needed if optional[name] == group and found[name]})
    for name, candidates in found.items():
        if name in checkpoint.checked:
            place = checkpoint.checked[name].place
            others = [candidate.place.name for candidate in candidates if candidate.place != place]
            beside = f" (also there: {some(others)})" if others else ""
            checkpoint.remarks.append(f"{name} from {place}{beside}")


def read_beside(
    path: Path, needed: Sequence[str], family: Family
) -> tuple[dict[str, list[FoundPart]], dict[str, list[str]]]:
    """Text encoder files beside a single file (or in text_encoders/ there), for each part those with an official name first,
    then the largest (of the finest dtype), and why others of them cannot be used.
    """
    found: dict[str, list[FoundPart]] = {part: [] for part in needed}
    problems: dict[str, list[str]] = {}
    folders = (path.parent, path.parent / "text_encoders")
    files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    for file in files if needed else ():
        try:
            part = part_in(file)
            if part in needed:
                found[part].append(read_encoder(file, part, family))
        except WeightsError as error:
            guess = next((part for part in needed if part in file.name), None)
            if guess is not None:
                problems.setdefault(guess, []).append(str(error).rstrip("."))

    def rank(name: str, candidate: FoundPart) -> tuple[int, int]:
        part, file = family.parts[name], candidate.place.name
        order = part.files.index(file) if file in part.files else len(part.files)
        used = (entry.size for key, entry in candidate.entries.items() if not surplus(part.network, key))
        return order, -sum(used)

    return {name: sorted(those, key=lambda each: rank(name, each)) for name, those in found.items()}, problems
