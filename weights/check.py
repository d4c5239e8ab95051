"""Compares the parts of a checkpoint, by their headers, with the networks that their own sizes describe."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from models.family import Configs, Family
from weights.files import FLOATS, Entry, WeightsError, some
from weights.names import Source, translate
from weights.parts import FoundPart

MOST = 100  # blocks, layers or levels in a row; the largest official network has 38


class NoInit(TorchFunctionMode):
    """Leaves out the initialisation of parameters, which costs seconds at full size even on the meta device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def build(network: type[nn.Module], config: Any) -> nn.Module:
    """The network on the meta device: names and shapes, no memory."""
    with torch.device("meta"), NoInit():
        return network(config)


@dataclass(frozen=True)
class CheckedPart:
    """A part that fits its network in every name, shape and dtype."""

    place: Path
    config: Any
    sources: Mapping[str, Source]
    entries: Mapping[str, Entry]
    module: Any  # nn.Module on the meta device

    @property
    def bytes_by_dtype(self) -> Counter:
        """Bytes in the file for each dtype, as safetensors spells it."""
        counts = Counter()
        for key in {key for source in self.sources.values() for key in source.keys}:
            counts[self.entries[key].dtype] += self.entries[key].size
        return counts


def check_part(name: str, found: FoundPart, family: Family) -> CheckedPart:
    """The part with its config and network; WeightsError with one list of all that does not fit."""
    if found.problem:
        raise WeightsError(found.problem)
    part = family.parts[name]
    sources, unexpected = translate(part.network, found.entries)
    refuse_long_rows(name, found, sources)
    shapes, misshaped = {}, []
    for target, source in sources.items():
        stored = [found.entries[key].shape for key in source.keys]
        shape = source.shape(stored)
        if shape is None:
            misshaped.append(f"{source.keys[0]}: {list(stored[0])}")
        else:
            shapes[target] = shape
    try:
        config = part.network.Config.from_shapes(shapes, {**part.given, **found.given})
    except ValueError as error:
        raise WeightsError(
            f"{found.place}: its {name} is not complete or not what it should be: {error}."
        ) from None
    try:
        module = build(part.network, config)
    except (RuntimeError, ValueError, TypeError) as error:  # torch: sizes whose product overflows
        raise WeightsError(
            f"{found.place}: its {name} describes an impossible network: {error!s:.200}."
        ) from None
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    spare = part.spare(config)
    missing = [key for key in expected if key not in sources and not key.startswith(spare)]
    unexpected += [key for target, source in sources.items() if target not in expected for key in source.keys]
    sources = {target: source for target, source in sources.items() if target in expected}
    misshaped += [f"{key}: {list(shapes[key])} instead of {list(expected[key])}" for key in sources
                  if key in shapes and shapes[key] != expected[key]]  # fmt: skip
    naming = ""  # `missing` has our names, `unexpected` the file's
    if any(target not in source.keys for target, source in sources.items()):
        naming = f", named as {'by Hugging Face' if part.tokenizer else 'in the official single file'}"
    keys = sorted({key for source in sources.values() for key in source.keys})
    other = [f"{key}: {found.entries[key].dtype}" for key in keys if found.entries[key].dtype not in FLOATS]
    kinds = ((f"missing{naming}", missing), ("unexpected", sorted(unexpected)), ("mis-shaped", misshaped),
             ("of a dtype that is no float known here", other))  # fmt: skip
    report = [f"{len(names)} {what} ({some(names)})" for what, names in kinds if names]
    if report:
        raise WeightsError(
            f"{found.place}: the tensors of its {name} do not make up the network: {'; '.join(report)}."
        )
    return CheckedPart(found.place, config, sources, found.entries, module)


def refuse_long_rows(name: str, found: FoundPart, sources: Mapping[str, Source]) -> None:
    """WeightsError where a name counts further than any network does: building it would take for ever."""
    for target in sources:
        if any(int(number) >= MOST for number in re.findall(r"\.(\d+)\.", target)):
            raise WeightsError(
                f"{found.place}: its {name} is not what it should be: tensor {some([target])} counts further than any"
                f" network does ({MOST})."
            )


def check_together(path: Path, family: Family, configs: Configs) -> None:
    """WeightsError unless the parts that are there fit each other."""
    if problems := family.misfit(configs):
        raise WeightsError(f"{path} cannot be run: {'; '.join(problems)}.")
