"""A checkpoint: what its headers describe, and from there to modules and tokenizers.

A module is built on the meta device and given the tensors of the file (strict, assign), so that nothing is allocated
twice: on the CPU, in the dtype of the file, the parameters are the memory-mapped file itself.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.clip import CLIPText
from models.t5 import Linear as T5Linear
from models.tokenizers import CLIPTokenizer, T5Tokenizer
from weights.check import CheckedPart, build, check_part, check_together
from weights.files import FLOATS, FP8, Entry, Reader, WeightsError
from weights.parts import Contents, FoundPart
from weights.tokenizers import (
    CLIP_WORDS,
    TOKENIZER_FILES,
    T5JsonTokenizer,
    clip_tokenizer,
    t5_tokenizer,
)

T5_LENGTH = 256  # diffusers' default; Stability's code pads to 77 at least
TextTokenizer = CLIPTokenizer | T5Tokenizer | T5JsonTokenizer


class Checkpoint:
    """A recognised and checked checkpoint, of which nothing but headers has been read.

    `model` its family; `layout` "single" or "folder"; `defaults` what it proposes (prompt, height, width, guidance,
    shift, if given); `zero_negative` whether zeros stand for no negative prompt (else the empty text); `problems`
    part -> why what is there cannot be used; `remarks` sentences that the user should read; with `keep`, what is
    loaded stays, for the pictures to come.
    """

    keep = False

    def __init__(self, contents: Contents, t5_file: str | None = None):
        self.model, self.layout, self.path = contents.family, contents.layout, contents.path
        self.defaults, self.zero_negative = contents.defaults, contents.zero_negative
        self.problems: dict[str, list[str]] = {}
        self.unusable = {  # why a part inside a single file cannot be used: a picture needs another, or none
            name: found.problem.rstrip(".")
            for name, found in contents.parts.items()
            if found.problem and contents.layout == "single"
        }
        self.remarks = [*contents.remarks, *(r for found in contents.parts.values() for r in found.remarks)]
        self.t5_length, self.t5_file = (
            contents.t5_length or T5_LENGTH,
            t5_file and os.path.expanduser(t5_file),
        )
        self.checked: dict[str, CheckedPart] = {}
        self.tokenizers: dict[str, TextTokenizer] = {}  # those that were asked for
        self.kept: dict[tuple, nn.Module] = {}  # arguments of `load` -> module
        # what can be done without may be wrong: in a folder in any way, in a single file by the way it is stored
        optional = {
            name: found
            for name, found in contents.parts.items()
            if self.model.parts[name].optional and (found.problem or found.place.is_dir())
        }
        for name, found in contents.parts.items():
            if name not in optional:
                self.checked[name] = check_part(name, found, self.model)
        check_together(self.path, self.model, self.configs)
        self.take({name: [found] for name, found in optional.items()})

    @property
    def family(self) -> str:
        """Name of the family."""
        return self.model.name

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that are there, in the family's order."""
        return tuple(name for name in self.model.parts if name in self.checked)

    @property
    def configs(self) -> dict[str, Any]:
        """Part -> config, of the parts that are there."""
        return {name: self.checked[name].config for name in self.parts}

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Names of the text encoders that are there."""
        return tuple(name for name in self.parts if self.model.parts[name].tokenizer)

    def take(self, found: Mapping[str, Sequence[FoundPart]]) -> None:
        """Of the candidates for some parts the first combination that fits; where none does each part on its own. `problems` say why not."""
        together = self.combination(found, self.checked)
        if together is None:
            for name, candidates in found.items():
                self.checked = self.combination({name: candidates}, self.checked) or self.checked
        else:
            self.checked = together
        self.problems = {
            name: list(dict.fromkeys(why)) for name, why in self.problems.items() if name not in self.checked
        }

    def combination(
        self, found: Mapping[str, Sequence[FoundPart]], taken: dict[str, CheckedPart]
    ) -> dict[str, CheckedPart] | None:
        """The parts `taken` and one candidate for each part in `found`, the first ones that fit together; None where none do."""
        if not found:
            return taken
        name, *others = found
        for candidate in found[name]:
            try:
                more = taken | {name: check_part(name, candidate, self.model)}
                configs = {part: those.config for part, those in more.items()}
                check_together(candidate.place, self.model, configs)
            except WeightsError as error:
                self.problems.setdefault(name, []).append(str(error).rstrip("."))
                continue
            if (whole := self.combination({other: found[other] for other in others}, more)) is not None:
                return whole
        return None

    def leave_out(self, name: str) -> None:
        """Go on as if there were no such part (T5 can be done without)."""
        self.checked.pop(name, None)
        self.problems.pop(name, None)
        self.unusable.pop(name, None)
        self.remarks = [remark for remark in self.remarks if not remark.startswith(f"{name} from ")]

    def part(self, name: str) -> CheckedPart:
        """A part as its header describes it; WeightsError if it is not there."""
        if name not in self.checked:
            raise WeightsError(f"{self.path} has no {name}.")
        return self.checked[name]

    def config(self, part: str) -> Any:
        """Config of a part."""
        return self.part(part).config

    def dtype(self, part: str) -> torch.dtype:
        """The dtype in which most of a part is stored (fp8 is for storage only: nothing computes in it)."""
        return FLOATS[self.part(part).bytes_by_dtype.most_common(1)[0][0]]

    @torch.no_grad()
    def load(
        self, part: str, dtype: torch.dtype, device: torch.device | str = "cpu", decoder_only: bool = False, stored: bool = False,
        names: tuple[str, ...] | None = None,
    ) -> Any:  # fmt: skip
        """A part as a module in eval mode without gradients, its tensors brought one by one to device and dtype.

        `decoder_only` leaves out the encoder of the autoencoder, which sampling does not need. With `stored`, T5's linear layers
        keep their stored dtype and are brought to the computing dtype one by one as they run. With `names`, only parameters whose names
        begin with one of these are loaded; the others stay on the meta device, where nothing can be computed with them.
        """
        asked = part, dtype, str(device), decoder_only, stored, names
        if asked in self.kept:
            return self.kept[asked]
        checked, network = self.part(part), self.model.parts[part].network
        config = checked.config
        if network is CLIPText:
            config = replace(config, end=self.end_token(part))
        module = build(network, config)
        if decoder_only:
            for half in network.only_encoding:
                module._modules.pop(half, None)
        stays = {
            f"{name}.weight"
            for name, layer in module.named_modules()
            if stored and isinstance(layer, T5Linear)
        }
        state: dict[str, Tensor] = {}
        read = Reader()
        for name, tensor in module.state_dict().items():
            source = checked.sources.get(name)
            if names is not None and not name.startswith(names):
                state[name] = tensor.to(dtype)
                continue
            if source is None:  # spare, such as the last layer of a CLIP of which only the input is used
                state[name] = torch.zeros(tensor.shape, dtype=dtype, device=device)
                continue
            pieces = [read(checked.entries[key]) for key in source.keys]
            made = source.make(pieces)
            state[name] = made.contiguous().to(device, made.dtype if name in stays else dtype)
            if state[name].data_ptr() != pieces[0].data_ptr():
                read.copied(sum(piece.nbytes for piece in pieces))
        module.load_state_dict(state, strict=True, assign=True)
        module.eval().requires_grad_(False)
        if self.keep:
            self.kept[asked] = module
        return module

    def end_token(self, part: str) -> int | None:
        """The id of a CLIP's end token, which no tensor tells; None, for the last of its table, where there is no tokenizer to ask."""
        try:
            return self.tokenizer(part).end
        except WeightsError:
            return None

    def not_finite(self, part: str) -> Entry | None:
        """The first tensor of a part, by name, that holds NaN or infinity in its file; None where none does. Reads the whole part."""
        checked, read = self.part(part), Reader()
        for key in sorted({key for source in checked.sources.values() for key in source.keys}):
            tensor = read(checked.entries[key])
            if not torch.isfinite(tensor.float() if tensor.dtype in FP8 else tensor).all():
                return checked.entries[key]
            read.copied(tensor.nbytes)
        return None

    def digest(self) -> str:
        """A hash of names, shapes, dtypes and eight values from the middle of every tensor, and of the tokenizers' files.

        Two checkpoints that share it are almost surely the same.
        """
        digest, read = hashlib.sha256(), Reader()
        for part, file in self.tokenizer_files():
            try:
                content = hashlib.sha256(file.read_bytes()).hexdigest()
            except OSError as error:
                raise WeightsError(f"{file} cannot be read: {error.strerror or error}.") from None
            digest.update(f"{part} {file.name} {content}".encode())
        for part, checked in self.checked.items():
            for key, entry in sorted(checked.entries.items()):
                digest.update(f"{part} {key} {entry.dtype} {entry.shape}".encode())
                values = read(entry).flatten()
                middle = values[len(values) // 2 :][:8].clone()
                digest.update(middle.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def ships_tokenizer(self, part: str) -> bool:
        """Whether the tokenizer is CLIP's own, which comes with this project, and not in the checkpoint's folder."""
        clip = self.model.parts[part].network is CLIPText
        return clip and self.layout == "single" and self.config(part).vocabulary == CLIP_WORDS

    def tokenizer(self, part: str) -> TextTokenizer:
        """The tokenizer of a text encoder: text -> ids [1, length]."""
        if part not in self.tokenizers:
            self.tokenizers[part] = self.make_tokenizer(part)
        return self.tokenizers[part]

    def tokenizer_places(self, part: str) -> list[Path]:
        """Folders in which a tokenizer's files are looked for."""
        folder = self.model.parts[part].tokenizer
        if self.layout == "folder":
            return [self.path / folder]
        home = self.path.parent
        return [home, home / folder, home / "tokenizers"]

    def tokenizer_files(self) -> list[tuple[str, Path]]:
        """(part, file) of all files that tokenizers may be read from, except those that come with this project and T5's in the hub cache."""
        found = []
        for part in self.text_encoders:
            if self.ships_tokenizer(part):
                continue
            clip = self.model.parts[part].network is CLIPText
            places = [Path(self.t5_file)] if self.t5_file and not clip else self.tokenizer_places(part)
            files = [
                file for place in places for file in (place, *(place / name for name in TOKENIZER_FILES))
            ]
            found += [(part, file) for file in files if file.is_file()]
        return found

    def make_tokenizer(self, part: str) -> TextTokenizer:
        """A tokenizer from its files."""
        config, places, described = self.config(part), self.tokenizer_places(part), self.model.parts[part]
        if described.network is CLIPText:
            return clip_tokenizer([] if self.ships_tokenizer(part) else places, config, described.pad)
        return t5_tokenizer(places, config, self.t5_length, self.t5_file)
