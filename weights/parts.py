"""What a file or folder holds: the family, and each part as it stands there. Whether the parts fit is for weights/check.py.

File and folder names decide nothing, except for the sub-folders of the Hugging Face layout.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

import models
from models.family import Family, Part
from weights.files import Entry, WeightsError, parse, read_header, read_json, some
from weights.kinds import known, other_kind, quantised
from weights.sets import folder_entries

IGNORED = re.compile(  # tensors outside the parts that some files hold and nobody needs
    r"model_ema\..*|denoiser\.sigmas|model\.model_sampling\.sigmas|(text_encoders\.\w+|conditioner\.embedders\.0)\.logit_scale"
    r"|(sqrt_|sqrt_one_minus_|log_one_minus_|sqrt_recip_|sqrt_recipm1_)?alphas_cumprod(_prev)?|betas"
    r"|posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)"
)
TYPES = {"prompt": str, "height": int, "width": int}  # of proposed settings; all others are numbers


@dataclass(frozen=True)
class FoundPart:
    """One part as it stands in a file or folder: names without the prefix, and what is given about it beyond the shapes."""

    place: Path  # the file or sub-folder, for messages
    entries: Mapping[str, Entry] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    remarks: Sequence[str] = ()
    problem: str | None = None  # why it cannot be used


@dataclass(frozen=True)
class Contents:
    """All that a file or folder holds."""

    family: Family
    layout: str  # "single" or "folder"
    path: Path
    parts: Mapping[str, FoundPart]
    defaults: Mapping[str, Any]  # prompt, height, width, guidance, shift, if they are given
    t5_length: int | None = None
    zero_negative: bool = False  # whether zeros stand for no negative prompt (else the empty text)
    remarks: Sequence[str] = ()  # what the user should know, a sentence each


def read_contents(path: Path, without: Collection[str] = ()) -> Contents:
    """What a single file or a folder holds, except for the parts `without`, which the user gives in files of their own."""
    source = Folder(path) if path.is_dir() else SingleFile(path)
    family = source.family()
    parts = {name: source.part(name, part) for name, part in family.parts.items() if name not in without}
    return source.contents(family, {name: part for name, part in parts.items() if part is not None})


class SingleFile:
    """The official layout: every part under a prefix of its own in one file."""

    def __init__(self, path: Path):
        self.path = path
        self.entries, self.metadata = read_header(path)
        self.config = own_config(path, self.metadata)

    def family(self) -> Family:
        """The family whose mark the denoiser has; WeightsError where it is none, or a variant that is not supported."""
        for family in models.FAMILIES:
            if any(
                re.match(re.escape(family.parts["denoiser"].prefix) + family.mark, key)
                for key in self.entries
            ):
                refuse(self.path, family, self.entries)
                self.check_prediction(family)
                self.check_surplus(family)
                return family
        raise WeightsError(f"{self.path} is {other_kind(self.entries)}.")

    def check_prediction(self, family: Family) -> None:
        """WeightsError where the metadata names a prediction that is not the family's (modelspec, as kohya-ss/sd-scripts writes it)."""
        named = self.metadata.get("modelspec.prediction_type", "").strip().lower()
        for pattern, words in family.refused_predictions:
            if re.match(pattern, named):
                words = words.format(ascii(named)[:50])
                raise WeightsError(f"{self.path} is {words} (modelspec.prediction_type).")

    def check_surplus(self, family: Family) -> None:
        """WeightsError where tensors belong to no part and are not known to be useless."""
        prefixes = tuple(part.prefix for part in family.parts.values())
        outside = {
            key: entry
            for key, entry in self.entries.items()
            if not key.startswith(prefixes) and not IGNORED.fullmatch(key)
        }
        refuse_quantised(self.path, outside)
        if outside:
            raise WeightsError(
                f"{self.path} holds {len(outside)} tensors that do not belong to {family.title}: {some(list(outside))}."
            )

    def part(self, name: str, part: Part) -> FoundPart | None:
        """The part as it stands in the file; None where it is not there."""
        entries = {
            key.removeprefix(part.prefix): entry
            for key, entry in self.entries.items()
            if key.startswith(part.prefix)
        }
        if not entries:
            return None
        given = table(self.path, self.config, part.table or name)
        try:
            refuse_quantised(f"{self.path}: its {name}", entries)
        except WeightsError as error:
            return FoundPart(self.path, problem=str(error))
        return FoundPart(self.path, used(part, entries), given)

    def contents(self, family: Family, parts: Mapping[str, FoundPart]) -> Contents:
        """All of it, with what the metadata proposes."""
        defaults = checked_defaults(self.path, table(self.path, self.config, "defaults"))
        length = t5_length(self.path, self.config)
        return Contents(family, "single", self.path, parts, defaults, length, family.zero_negative)


class Folder:
    """The Hugging Face layout: every part in a sub-folder of its own."""

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[str, FoundPart] = {}

    def family(self) -> Family:
        """The family whose mark the denoiser has; WeightsError where it is none."""
        denoisers = {family.parts["denoiser"].folder: family.parts["denoiser"] for family in models.FAMILIES}
        folder = next((folder for folder in denoisers if (self.path / folder).is_dir()), None)
        if folder is None:
            raise WeightsError(
                f"{self.path} has neither {'/ nor '.join(denoisers)}/ in it: give the folder of an {known(' or ')} model"
                " in Hugging Face layout, or a .safetensors file."
            )
        entries, _ = folder_entries(self.path / folder, text=False)
        for family in models.FAMILIES:
            if family.parts["denoiser"].folder == folder and any(
                re.match(family.folder_mark, key) for key in entries
            ):
                refuse(self.path / folder, family, entries)
                return family
        titles = " nor ".join(
            f"{family.title}'s {family.parts['denoiser'].network.title}" for family in models.FAMILIES
        )
        kind = f"neither {titles}; its tensors: {some(list(entries)) or 'none'}"
        if "down_blocks.0.resnets.0.conv1.weight" in entries and "conv_in.weight" in entries:
            kind = f"the U-Net of a Stable Diffusion 1 or 2 model: only {known()} are run here"
        raise WeightsError(f"{self.path / folder} is {kind}.")

    def part(self, name: str, part: Part) -> FoundPart | None:
        """The part as it stands in its sub-folder; None where it is not there."""
        folder = self.path / part.folder
        if not folder.is_dir() or name != "denoiser" and not any(folder.iterdir()):
            return None
        try:
            config = read_json(folder / "config.json")
            require(folder / "config.json", config, part.fixed)
            entries, remarks = folder_entries(folder, text=part.tokenizer is not None)
            refuse_quantised(folder, entries)
        except WeightsError as error:
            return FoundPart(folder, problem=str(error))
        return FoundPart(folder, entries, given_by_json(part.network, config), remarks)

    def contents(self, family: Family, parts: Mapping[str, FoundPart]) -> Contents:
        """All of it, with what the scheduler's configuration and model_index.json say."""
        place = self.path / "scheduler"
        scheduler, index = (
            read_json(place / "scheduler_config.json"),
            read_json(self.path / "model_index.json"),
        )
        remarks = check_scheduler(self.path, family, scheduler, index)
        zeros = index.get("force_zeros_for_empty_prompt", True)
        if not isinstance(zeros, bool):
            where = f"{self.path / 'model_index.json'} says force_zeros_for_empty_prompt = {ascii(zeros):.50}"
            raise WeightsError(f"{where}: it must be true or false.")
        defaults = {name: scheduler[name] for name in family.scheduler.defaults if name in scheduler}
        defaults = checked_defaults(self.path, defaults)
        zero_negative = family.zero_negative and zeros
        return Contents(
            family, "folder", self.path, parts, defaults, zero_negative=zero_negative, remarks=remarks
        )


def given_by_json(network: type[nn.Module], config: Mapping) -> dict:
    """What a Hugging Face config.json tells beyond the shapes; null entries tell nothing."""
    fields = network.json_fields.items()
    return {ours: config[theirs] for theirs, ours in fields if config.get(theirs) is not None}


def used(part: Part, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The tensors of a part of a single file that are used."""
    return {
        key: entry for key, entry in entries.items() if not (part.unused and re.fullmatch(part.unused, key))
    }


def refuse(place: Path, family: Family, entries: Mapping[str, Entry]) -> None:
    """WeightsError where a checkpoint looks like the family's and is a variant that is not supported."""
    for name, words, width in family.refusals:
        for key, entry in entries.items():
            if re.match(name, key) and width in (None, *entry.shape[-1:]):
                raise WeightsError(f"{place} is {words}.")


def refuse_quantised(place: Path | str, entries: Mapping[str, Entry]) -> None:
    """WeightsError where weights are quantised in a way that is not supported."""
    if words := quantised(entries):
        raise WeightsError(f"{place} holds {words}.")


def own_config(path: Path, metadata: Mapping[str, str]) -> dict:
    """The metadata entry `hybridiff.config`, a JSON object; {} where there is none."""
    return parse(f"{path}, metadata entry hybridiff.config", metadata.get("hybridiff.config", "{}"))


def table(path: Path, config: Mapping, name: str) -> dict:
    """One sub-table of the metadata's configuration; {} where there is none."""
    value = config.get(name, {})
    if not isinstance(value, dict):
        raise WeightsError(f"{path}, metadata entry hybridiff.config: {name} is not a table.")
    return value


def checked_defaults(path: Path, defaults: dict) -> dict:
    """The proposed settings; WeightsError where one is not of its type."""
    for name, value in defaults.items():
        fits = isinstance(value, TYPES.get(name, (int, float))) and not isinstance(value, bool)
        if not fits or not isinstance(value, str) and not 0 < value < 1e6:
            raise WeightsError(f"{path} proposes {name:.50} = {value!r:.50}, which is no such value.")
    return defaults


def t5_length(path: Path, config: Mapping) -> int | None:
    """T5's number of tokens, where the metadata gives one."""
    length = config.get("t5_length")
    fits = isinstance(length, int) and not isinstance(length, bool) and 1 < length <= 4096
    if length is not None and not fits:
        raise WeightsError(f"{path}, metadata entry hybridiff.config: t5_length is {length!r:.50}.")
    return length


def check_scheduler(path: Path, family: Family, scheduler: Mapping, index: Mapping) -> list[str]:
    """Remarks on a folder's scheduler; WeightsError where it belongs to another kind of model or asks for what is not done."""
    rules, place = family.scheduler, path / "scheduler"
    listed = index.get("scheduler")  # ["diffusers", the class], which diffusers goes by
    named = {place: scheduler.get("_class_name")}
    if isinstance(listed, list) and len(listed) == 2:
        named[path / "model_index.json"] = listed[1]
    remarks = []
    for where, name in named.items():
        if name is None or re.fullmatch(rules.usual, str(name)):
            continue
        if re.fullmatch(rules.refused, str(name), re.DOTALL):
            raise WeightsError(f"{where} names the scheduler {ascii(name):.80}: {rules.reason}.")
        remarks = [
            f"The folder's scheduler is {ascii(name):.80}, which is not among the samplers here: {rules.reason}, and the picture may"
            " want other steps and guidance."
        ]
    require(place, scheduler, rules.fixed)
    different = {name: value for name, value in rules.sampled.items() if scheduler.get(name, value) != value}
    if different:
        asked = ", ".join(f"{name} = {ascii(scheduler[name]):.50}" for name in different)
        remarks.append(
            f"The folder's scheduler asks for {asked}; the samplers here space the steps as {family.title}'s own does."
        )
    if other := [name for name in rules.unset if scheduler.get(name)]:
        raise WeightsError(
            f"{place} asks for {', '.join(other)}, which is not done here: {family.title}'s own schedule"
            " has a fixed shift and none of these."
        )
    return remarks


def require(place: Path, config: Mapping, fixed: Mapping) -> None:
    """WeightsError where a configuration gives a field another value than the only one that is done here."""
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise WeightsError(f"{place} says {name} = {ascii(config[name]):.50}; only {value} is done here.")
