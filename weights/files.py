"""Safetensors files: a file is judged by its header before anything else touches it.

A file is 8 bytes of header length (little endian), the header as JSON (name -> dtype, shape, data_offsets;
`__metadata__` holds strings), then the tensors, packed without gaps. Source: the README of huggingface/safetensors.
The package safetensors checks all of that when it opens a file; here stand what it lets pass and clear sentences.
"""

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

REMAP = 2**29  # bytes
MAX_HEADER = 16_000_000  # bytes; forty times the largest official header (safetensors itself allows 100 MB)
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # for storage only
KINDS = (  # what a file that is no safetensors file begins with, and what it is
    (
        b"PK\x03\x04",
        "a PyTorch pickle (.ckpt, .pt or .bin), which is never opened here: fetch the .safetensors file",
    ),
    (b"\x80\x02", "a Python pickle, which is never opened here: fetch the .safetensors file"),
    (b"\x80\x03", "a Python pickle, which is never opened here: fetch the .safetensors file"),
    (b"\x80\x04", "a Python pickle, which is never opened here: fetch the .safetensors file"),
    (
        b"<",
        "a web page, not a safetensors file: log in where it came from, accept the licence and fetch it again",
    ),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (b"GGUF", "a GGUF file: fetch the .safetensors file"),
)


class WeightsError(Exception):
    """One clear sentence: what is wrong with which file, and what to do."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies and what it is, as the header of its file says."""

    file: Path
    key: str
    dtype: str  # as safetensors spells it, such as "F16"
    shape: tuple[int, ...]
    size: int  # bytes in the file


def parse(where: str, text: str) -> dict:
    """A JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{where} is not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{where} is not a JSON object.")
    return value


def read_json(path: Path) -> dict:
    """A JSON object from a small file; {} where there is no such file."""
    try:
        if not path.is_file():
            return {}
        if path.stat().st_size > 10_000_000:
            raise WeightsError(f"{path} is too long for a configuration.")
        return parse(str(path), path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} cannot be read: {error}.") from None


def some(names: list[str], count: int = 4) -> str:
    """The first few of a list of names, made printable."""
    plain = (name if name.isascii() and name.isprintable() else ascii(name) for name in names[:count])
    return ", ".join(f"{name:.120}" for name in plain) + (", ..." if len(names) > count else "")


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The entries and the metadata of a file; WeightsError unless the file is whole and well formed."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise WeightsError(
            f"{ascii(str(path))} is not a name in UTF-8, which the package safetensors needs: rename it."
        ) from None
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise WeightsError(f"{path} is not a file.")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = check_start(path, start + file.read(16), size)
            file.seek(8)
            text = file.read(length)
        header = parse_header(path, text, size)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}.") from None
    metadata = header.pop("__metadata__", None) or {}
    return entries_of(path, header), metadata


def parse_header(path: Path, text: bytes, size: int) -> dict:
    """The table in `text`, which is the header of a file of `size` bytes, once safetensors has found no fault with the file."""
    try:
        with safe_open(
            path, framework="np"
        ):  # checks JSON, dtypes, shapes and places against the file's size
            return json.loads(text, object_pairs_hook=unique)
    except (SafetensorError, ValueError) as error:
        reason = ascii(str(error).removeprefix("Error while deserializing header: "))[1:-1]
        raise WeightsError(
            f"{path} is cut off or damaged: it has {size:,} bytes, and its header is refused"
            f" ({reason:.300}); fetch it again."
        ) from None


def check_start(path: Path, start: bytes, size: int) -> int:
    """Length of the header, after a look at the first bytes for what the file might be instead."""
    for magic, kind in KINDS:
        if start.lstrip().startswith(magic) if magic == b"<" else start.startswith(magic):
            # 0x3c.. can also be the length of a header: then an opening brace follows it
            if start[8:9] != b"{":
                raise WeightsError(f"{path} is {kind}.")
    if size < 10:
        raise WeightsError(f"{path} is {size} bytes long, too short for a safetensors file; fetch it again.")
    length = int.from_bytes(start[:8], "little")
    if start[8:9] != b"{":
        raise WeightsError(f"{path} is not a safetensors file: no header follows its first 8 bytes.")
    if length > size - 8:
        raise WeightsError(
            f"{path} is cut off or damaged: {size:,} bytes, but its header alone claims {length:,};"
            " fetch it again."
        )
    if length > MAX_HEADER:
        raise WeightsError(f"{path} has a header of {length:,} bytes, more than any model needs.")
    return length


def unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object, refused if a key occurs twice."""
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name occurs twice")
    return table


def entries_of(path: Path, header: dict) -> dict[str, Entry]:
    """Name -> entry of a header that safetensors has checked; a name of absurd length is refused, or one given twice."""
    entries = {}
    for key, fields in header.items():
        if len(key) > 500:
            raise WeightsError(f"{path} has a tensor with a name of {len(key):,} characters.")
        name = key.replace("_orig_mod.", "")  # which torch.compile puts before the names of a module
        if name in entries:
            raise WeightsError(f"{path} holds tensor {name!a:.200} twice, with and without _orig_mod.")
        begin, end = fields["data_offsets"]
        entries[name] = Entry(path, key, fields["dtype"], tuple(fields["shape"]), end - begin)
    return entries


class Reader:
    """Gives for an entry its tensor on the CPU: a view of the memory-mapped file, nothing is copied or read yet.

    Who copies tensors elsewhere says so by `copied`: after every REMAP bytes the files are mapped anew, so that the pages
    of what was copied do not stay. A view keeps its own mapping.
    """

    def __init__(self):
        self.files, self.bytes = {}, 0

    def __call__(self, entry: Entry) -> Tensor:
        try:
            if entry.file not in self.files:
                self.files[entry.file] = safe_open(entry.file, framework="pt", device="cpu")
            return self.files[entry.file].get_tensor(entry.key)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{entry.file} cannot be read: {error}.") from None

    def copied(self, size: int) -> None:
        """So many bytes of what was read lie elsewhere now."""
        self.bytes += size
        if self.bytes > REMAP:
            self.files.clear()
            self.bytes = 0
