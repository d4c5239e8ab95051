"""From files to modules: `open_checkpoint` reads headers only, `Checkpoint.load` fills one part.

A module is built on the meta device and given the tensors of the file (strict, assign), so that nothing is allocated
twice: on the CPU, in the dtype of the file, the parameters are the memory-mapped file itself.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from models.t5 import Linear as T5Linear
from models.tokenizers import CLIPTokenizer, T5Tokenizer
from weights.check import Config, Fitted, build, check_part, check_together
from weights.files import FLOATS, FP8, Entry, Reader, WeightsError, some
from weights.find import locate
from weights.parts import PREFIXES, Contents, Part, read_beside, read_encoder, read_folder, read_single
from weights.tokenizers import CLIP_WORDS, T5JsonTokenizer, clip_tokenizer, t5_tokenizer

PARTS = ("denoiser", "vae", "clip_l", "clip_g", "t5")
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
)
T5_LENGTH = 256  # diffusers' default; Stability's code pads to 77 at least
__all__ = ["Checkpoint", "WeightsError", "open_checkpoint"]


class Checkpoint:
    """A recognised and checked checkpoint, of which nothing but headers has been read.

    `family` "sdxl" or "sd3"; `layout` "single" or "folder"; `defaults` what it proposes (prompt, height, width,
    guidance, shift, as far as given); `zero_negative` whether SDXL is told zeros where there is no negative prompt (else
    the empty text); `notes` part -> why files beside it, or the folder's own T5, cannot be used; `unusable` why the T5 inside
    a single file cannot;
    `remarks` sentences that the user should read; with `keep`, what is loaded stays, for the pictures to come.
    """

    keep = False

    def __init__(self, contents: Contents, t5_file: str | None = None):
        self.family, self.layout, self.path = contents.family, contents.layout, contents.path
        self.defaults, self.zero_negative = contents.defaults, contents.zero_negative
        self.notes: dict[str, list[str]] = dict(contents.notes)
        self.remarks, self.unusable = list(contents.remarks), contents.unusable
        self.t5_length, self.t5_file = (
            contents.t5_length or T5_LENGTH,
            t5_file and os.path.expanduser(t5_file),
        )
        parts = dict(contents.parts)
        own_t5 = (
            {"t5": [parts.pop("t5")]} if "t5" in parts and parts["t5"].place.is_dir() else {}
        )  # a folder's, which can be done without
        self.fitted: dict[str, Fitted] = {
            name: check_part(name, parts[name], self.family) for name in PARTS if name in parts
        }
        check_together(self.path, self.family, {name: part.config for name, part in self.fitted.items()})
        self.take(own_t5)
        self.tokenizers: dict[
            str, CLIPTokenizer | T5Tokenizer | T5JsonTokenizer
        ] = {}  # those that were asked for
        self.kept: dict[tuple, nn.Module] = {}  # arguments of `load` -> module

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that are there, in the order of PARTS."""
        return tuple(name for name in PARTS if name in self.fitted)

    def look_beside(self) -> None:
        """Text encoders that an SD3 file lacks, from the files beside it: those that fit together, and notes why others do not."""
        found, self.notes = read_beside(
            self.path, [part for part in ("clip_l", "clip_g", "t5") if part not in self.fitted]
        )
        for group in (("clip_l", "clip_g"), ("t5",)):  # the CLIPs must fit each other, T5 the denoiser alone
            self.take({part: found[part] for part in group if found.get(part)})
        for part, candidates in found.items():
            if part in self.fitted:
                place = self.fitted[part].place
                others = [candidate.place.name for candidate in candidates if candidate.place != place]
                beside = f" (also there: {some(others)})" if others else ""
                self.remarks.append(f"{part} from {place}{beside}")

    def take(self, found: Mapping[str, Sequence[Part]]) -> None:
        """Of the candidates for some parts the first combination that fits; where none does each part on its own. Notes say why not."""
        together = self.combination(found, self.fitted)
        if together is None:
            for name, candidates in found.items():
                self.fitted = self.combination({name: candidates}, self.fitted) or self.fitted
        else:
            self.fitted = together
        self.notes = {
            name: list(dict.fromkeys(why)) for name, why in self.notes.items() if name not in self.fitted
        }

    def combination(
        self, found: Mapping[str, Sequence[Part]], taken: dict[str, Fitted]
    ) -> dict[str, Fitted] | None:
        """The parts `taken` and one candidate for each part in `found`, the first ones that fit together; None where none do."""
        if not found:
            return taken
        name, *others = found
        for candidate in found[name]:
            try:
                more = taken | {name: check_part(name, candidate, self.family)}
                check_together(
                    candidate.place, self.family, {part: those.config for part, those in more.items()}
                )
            except WeightsError as error:
                self.notes.setdefault(name, []).append(str(error).rstrip("."))
                continue
            if (whole := self.combination({other: found[other] for other in others}, more)) is not None:
                return whole
        return None

    def leave_out(self, name: str) -> None:
        """Go on as if there were no such part (T5 can be done without)."""
        self.fitted.pop(name, None)
        self.unusable = None if name == "t5" else self.unusable
        self.remarks = [remark for remark in self.remarks if not remark.startswith(f"{name} from ")]

    def part(self, name: str) -> Fitted:
        """A part as its header describes it; WeightsError if it is not there."""
        if name not in self.fitted:
            raise WeightsError(f"{self.path} has no {name}.")
        return self.fitted[name]

    def config(self, part: str) -> Config:
        """Config of a part."""
        return self.part(part).config

    def dtype(self, part: str) -> torch.dtype:
        """The dtype in which most of a part is stored (fp8 is for storage only: nothing computes in it)."""
        return FLOATS[self.part(part).bytes_by_dtype.most_common(1)[0][0]]

    @torch.no_grad()
    def load(
        self, part: str, dtype: torch.dtype, device: torch.device | str = "cpu", decoder_only: bool = False, stored: bool = False,
        names: tuple[str, ...] | None = None,
    ) -> nn.Module:  # fmt: skip
        """A part as a module in eval mode without gradients, its tensors brought one by one to device and dtype.

        `decoder_only` leaves out the encoder of the autoencoder, which sampling does not need. With `stored`, T5's linear layers
        keep their stored dtype and are brought to the computing dtype one by one as they run. With `names`, only parameters whose names
        begin with one of these are loaded; the others stay on the meta device, where nothing can be computed with them.
        """
        asked = part, dtype, str(device), decoder_only, stored, names
        if asked in self.kept:
            return self.kept[asked]
        fitted = self.part(part)
        config = fitted.config
        if fitted.kind == "clip":
            config = replace(config, end=self.end_token(part))
        module = build(fitted.kind, config)
        if decoder_only:
            for half in ("encoder", "quant_conv"):
                module._modules.pop(half, None)
        stays = {
            f"{name}.weight"
            for name, layer in module.named_modules()
            if stored and isinstance(layer, T5Linear)
        }
        state: dict[str, Tensor] = {}
        read = Reader()
        for name, tensor in module.state_dict().items():
            source = fitted.sources.get(name)
            if names is not None and not name.startswith(names):
                state[name] = tensor.to(dtype)
                continue
            if source is None:  # the last layer of SDXL's CLIP-L, of which only the input is used
                state[name] = torch.zeros(tensor.shape, dtype=dtype, device=device)
                continue
            pieces = [read(fitted.entries[key]) for key in source.keys]
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
        fitted, read = self.part(part), Reader()
        for key in sorted({key for source in fitted.sources.values() for key in source.keys}):
            tensor = read(fitted.entries[key])
            if not torch.isfinite(tensor.float() if tensor.dtype in FP8 else tensor).all():
                return fitted.entries[key]
            read.copied(tensor.nbytes)
        return None

    def digest(self) -> str:
        """A hash of names, shapes, dtypes and eight values from the middle of every tensor, and of the tokenizers' files; two checkpoints that share it are almost surely the same."""
        told = hashlib.sha256()
        read = Reader()
        for part, file in self.tokenizer_files():
            try:
                content = hashlib.sha256(file.read_bytes()).hexdigest()
            except OSError as error:
                raise WeightsError(f"{file} cannot be read: {error.strerror or error}.") from None
            told.update(f"{part} {file.name} {content}".encode())
        for part, fitted in self.fitted.items():
            for key, entry in sorted(fitted.entries.items()):
                told.update(f"{part} {key} {entry.dtype} {entry.shape}".encode())
                values = read(entry).flatten()
                middle = values[len(values) // 2 :][:8].clone()
                told.update(middle.view(torch.uint8).numpy().tobytes())
        return told.hexdigest()

    def ships_tokenizer(self, part: str) -> bool:
        """Whether the tokenizer is CLIP's own, which comes with this project, and not in the checkpoint's folder."""
        return part != "t5" and self.layout == "single" and self.config(part).vocabulary == CLIP_WORDS

    def tokenizer(self, part: str) -> CLIPTokenizer | T5Tokenizer | T5JsonTokenizer:
        """The tokenizer of a text encoder: text -> ids [1, length]. CLIP-L pads with the end token, bigG with 0."""
        if part not in self.tokenizers:
            self.tokenizers[part] = self.make_tokenizer(part)
        return self.tokenizers[part]

    def tokenizer_places(self, part: str) -> list[Path]:
        """The folders in which the tokenizer of a text encoder may lie."""
        folder = {"clip_l": "tokenizer", "clip_g": "tokenizer_2", "t5": "tokenizer_3"}[part]
        home = self.path if self.layout == "folder" else self.path.parent
        return [home / folder] if self.layout == "folder" else [home, home / folder, home / "tokenizers"]

    def tokenizer_files(self) -> list[tuple[str, Path]]:
        """(part, file) of all files that tokenizers may be read from, but for those that come with this project and T5's in the hub cache."""
        found = []
        for part in ("clip_l", "clip_g", "t5"):
            if part not in self.fitted or self.ships_tokenizer(part):
                continue
            places = self.tokenizer_places(part)
            if part == "t5" and self.t5_file:
                places = [Path(self.t5_file)]
            files = [
                file for place in places for file in (place, *(place / name for name in TOKENIZER_FILES))
            ]
            found += [(part, file) for file in files if file.is_file()]
        return found

    def make_tokenizer(self, part: str) -> CLIPTokenizer | T5Tokenizer | T5JsonTokenizer:
        """A tokenizer from its files."""
        config, places = self.config(part), self.tokenizer_places(part)
        if part == "t5":
            return t5_tokenizer(places, config, self.t5_length, self.t5_file)
        return clip_tokenizer(
            [] if self.ships_tokenizer(part) else places, config, pad=0 if part == "clip_g" else None
        )


def open_checkpoint(name: str, text_encoders: Sequence[str] = (), t5_file: str | None = None) -> Checkpoint:
    """Recognises and checks a checkpoint: "demo-sdxl", "demo-sd3", a .safetensors file, a folder or a hub id.

    `text_encoders`: files with one text encoder each (clip_l, clip_g, t5xxl), which take the place of the checkpoint's;
    those that an SD3 file lacks are looked for beside it. `t5_file`: T5's spiece.model. Raises WeightsError. Reads
    headers only.
    """
    try:
        path = locate(name)
        encoders = [(file, *read_encoder(Path(os.path.expanduser(file)))) for file in text_encoders]
        contents = (
            read_folder(path, without=[part for _, part, _ in encoders])
            if path.is_dir()
            else read_single(path, without=[part for _, part, _ in encoders])
        )
        parts, given = dict(contents.parts), {}
        for file, part, found in encoders:
            if part not in PREFIXES[contents.family]:
                raise WeightsError(
                    f"{file} is a {part} text encoder, which {contents.family.upper()} does not have."
                )
            if part in given:
                raise WeightsError(
                    f"{given[part]} and {file} are both a {part} text encoder: give one of them."
                )
            parts[part], given[part] = found, file
        remarks = [*contents.remarks, *(f"{part} from {file}" for part, file in given.items())]
        checkpoint = Checkpoint(replace(contents, parts=parts, remarks=remarks), t5_file)
        if (contents.family, contents.layout) == ("sd3", "single"):
            checkpoint.look_beside()
        return checkpoint
    except OSError as error:
        raise WeightsError(f"{ascii(name):.200} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:  # a path with a null byte
        raise WeightsError(f"{ascii(name):.200} cannot be read: {error}.") from None
