"""Rules from the names in a file to the official names, for the namings that stand beside each network."""

import re
from collections.abc import Callable, Collection

# regex of a whole name in the file; its groups -> [(official name, how)], see weights/names.py for the ways
Rule = tuple[str, Callable[..., list[tuple[str, str]]]]
Naming = tuple[str, Callable[[Collection[str]], list[Rule]]]  # what some of its names begin with, its rules


def copy(name: str) -> list[tuple[str, str]]:
    """One parameter, unchanged."""
    return [(name, "copy")]


def identity(names: str) -> Rule:
    """Names that are equal on both sides."""
    return rf"((?:{names}).*)", copy


def one_of(names: Collection[str]) -> str:
    """A regex for any of these names."""
    return "|".join(map(re.escape, names))


def official(keys: Collection[str]) -> list[Rule]:
    """The official single-file naming: nothing to do."""
    return [identity("")]
