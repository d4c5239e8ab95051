"""From the names in a file to the names of the modules, by the rules that stand beside each network.

`translate` is pure: a set of file names in, for each module parameter the file names it is made from and how. The
namings are the official single-file one, OpenCLIP's (bigG inside SDXL single files) and Hugging Face's. Which one a part
has is read off its names. Facts: diffusers scripts/convert_sd3_to_diffusers.py and loaders/single_file_utils.py,
Stability-AI/generative-models, mlfoundations/open_clip.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Source:
    """What a module parameter is made from.

    `how`: "copy"; "concat" (three tensors along dim 0); "third 0|1|2" (of dim 0); "transpose"; "swap" (exchange the
    halves of dim 0); "conv" ([C, C] -> [C, C, 1, 1]).
    """

    keys: tuple[str, ...]
    how: str

    def make(self, tensors: list[Tensor]) -> Tensor:
        """The parameter from the tensors under `keys`: a view where possible."""
        if self.how == "concat":
            return torch.cat(tensors)
        (tensor,) = tensors
        if self.how.startswith("third"):
            return tensor.chunk(3)[int(self.how[-1])]
        if self.how == "swap":
            return torch.cat(tensor.chunk(2)[::-1])
        if self.how == "transpose":
            return tensor.T
        if self.how == "conv":
            return tensor.reshape(*tensor.shape[:2], 1, 1)
        return tensor

    def shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
        """Shape of the parameter from the shapes under `keys`; None where they do not allow it."""
        first, rank = shapes[0], len(shapes[0])
        if self.how == "concat":
            same = all(s[1:] == first[1:] for s in shapes) and rank > 0
            return (sum(s[0] for s in shapes), *first[1:]) if same else None
        if self.how.startswith("third"):
            return (first[0] // 3, *first[1:]) if rank and first[0] % 3 == 0 and first[0] else None
        if self.how == "swap":
            return first if rank and first[0] % 2 == 0 and first[0] else None
        if self.how == "transpose":
            return first[::-1] if rank == 2 else None
        if self.how == "conv":
            return (*first[:2], 1, 1) if rank == 2 or rank == 4 and first[2:] == (1, 1) else None
        return first


def surplus(network: type[nn.Module], key: str) -> bool:
    """Whether a tensor of such a network (its name without the prefix of the part) is known to be of no use."""
    return bool(network.surplus) and re.fullmatch(network.surplus, key) is not None


def translate(network: type[nn.Module], keys: Collection[str]) -> tuple[dict[str, Source], list[str]]:
    """Module name -> Source for every name that the keys (prefix of the part stripped) give, and the unexpected keys.

    Keys that are known to be of no use are in neither.
    """
    keys = sorted(key for key in keys if not surplus(network, key))
    namings = (make(set(keys)) for start, make in network.namings if any(k.startswith(start) for k in keys))
    rules = [(re.compile(pattern), targets) for pattern, targets in next(namings, [])]
    found: dict[str, dict[str, str]] = {}  # module name -> {how: key}
    unexpected = []
    for key in keys:
        match, targets = next(((m, t) for pattern, t in rules if (m := pattern.fullmatch(key))), (None, None))
        if match is None:
            unexpected.append(key)
            continue
        for name, how in targets(*match.groups()):
            pieces = found.setdefault(name, {})
            if how in pieces or pieces and not {how, *pieces} <= set("qkv"):
                unexpected.append(key)  # a second key for the same thing
            else:
                pieces[how] = key
    sources = {}
    for name, pieces in found.items():
        if pieces.keys() == set("qkv"):
            sources[name] = Source(tuple(pieces[letter] for letter in "qkv"), "concat")
        elif len(pieces) == 1 and not pieces.keys() & set("qkv"):
            ((how, key),) = pieces.items()
            sources[name] = Source((key,), how)
    return sources, unexpected
