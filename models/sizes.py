"""What the configs use to read their sizes off the shapes of tensors. A ValueError names the tensor or the value that does not fit."""

import re
from collections.abc import Iterable, Mapping

HEAD_WIDTH = 64  # of SDXL, SD3, CLIP-L and bigG

Shapes = Mapping[str, tuple[int, ...]]  # by official name


def size(shapes: Shapes, name: str, dim: int, rank: int) -> int:
    """One dimension of a tensor that must be there with that many dimensions, none of them zero."""
    shape = shapes.get(name)
    if shape is None:
        raise ValueError(f"tensor {name} is missing")
    if len(shape) != rank or min(shape) < 1:
        raise ValueError(f"tensor {name} has the impossible shape {list(shape)}")
    return shape[dim]


def how_many(keys: Iterable[str], pattern: str) -> int:
    """How many numbers 0, 1, 2, ... the one group of the pattern takes, without a gap, at the start of the keys."""
    found = {int(match[1]) for key in keys if (match := re.match(pattern, key))}
    return next(i for i in range(len(found) + 1) if i not in found)


def at_least_one(number: int, what: str) -> int:
    """The number itself; ValueError if it is zero."""
    if number < 1:
        raise ValueError(f"there are no {what}")
    return number


def divide(whole: int, part: int, what: str) -> int:
    """Exact division; ValueError if there is a remainder."""
    if part < 1 or whole < part or whole % part:
        raise ValueError(f"{what}: {whole} cannot be divided into {part}")
    return whole // part


def number(given: Mapping, name: str, default: float, kind: type = int) -> float:
    """A positive whole number (or any not huge one, kind=float) from what is given, else the default."""
    value = given.get(name, default)
    fits = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not fits or not (1 if kind is int else -1e9) <= value <= 1e9:
        raise ValueError(f"the configuration gives {name} = {value!r:.50}")
    return kind(value)


def heads(given: Mapping, width: int, head_width: int = HEAD_WIDTH) -> int:
    """Number of attention heads of that width; `given` may have `heads` or `head_width`."""
    if "heads" in given:
        found = number(given, "heads", 1)
        divide(width, found, "attention heads")
        return found
    return divide(width, number(given, "head_width", head_width), "attention heads")


def groups(given: Mapping, channels: int) -> int:
    """Groups of the group norms, which must divide the narrowest level."""
    found = number(given, "groups", 32)
    divide(channels, found, "norm groups")
    return found


def layers(found: int, official: Mapping[int, int], width: int, given: Mapping) -> int:
    """Number of layers; ValueError if there are fewer or more than the file's config or the official width says.

    A file that lacks some of the last layers would still make up a network. `given["spare_layers"]` of them may be missing.
    """
    expected = number(given, "layers", official.get(width, at_least_one(found, "layers in the text encoder")))
    if not expected - given.get("spare_layers", 0) <= found <= expected:
        raise ValueError(f"{found} layers are there where {expected} are expected")
    return expected
