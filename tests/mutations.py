"""Seeded damage to safetensors files, from flipped bits to well-formed files with the wrong tensors."""

import json
import random
import re
from pathlib import Path

import torch

from weights.describe import describe
from weights.load import WeightsError, open_checkpoint

JUNK = [None, True, -1, 0, 1, 3, 2**31, 2**62, 2**64, 10**400, 0.5, 1e308, float("nan"), "", "F16", "\ud800",
        "x" * 1000, [], [1], [[1]], {}, {"a": 1}, [0, 2**62]]  # fmt: skip
FOREIGN = [b"", b"\n", b"{}", b"<!DOCTYPE html><html>login</html>" * 20, b"\x80\x02}q\x00.", b"PK\x03\x04" + b"\0" * 99,
           b"version https://git-lfs.github.com/spec/v1\n", b"GGUF" + b"\0" * 60, b"\0" * 100, b"\xff" * 100,
           (2**40).to_bytes(8, "little") + b"{}" * 50, (2).to_bytes(8, "little") + b"{}",
           (200_000).to_bytes(8, "little") + b"{\"a\":" * 40_000,
           (200_000).to_bytes(8, "little") + b"[" * 200_000]  # fmt: skip


def split(data: bytes) -> tuple[dict, bytes]:
    """Header and tensor bytes of a whole file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict, body: bytes) -> bytes:
    """A file from header and tensor bytes."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice([rng.randrange(len(data)), rng.randrange(200), len(data) - rng.randrange(1, 9)])]


def extended(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.randrange(1, 100))


def flipped(data: bytes, rng: random.Random) -> bytes:
    """A few bits anywhere in the length or the header."""
    damaged = bytearray(data)
    reach = rng.choice([8, 8 + int.from_bytes(data[:8], "little")])
    for _ in range(rng.randrange(1, 4)):
        damaged[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def scrambled(data: bytes, rng: random.Random) -> bytes:
    """A stretch of the file cut out, repeated or overwritten."""
    at, size = rng.randrange(len(data)), rng.randrange(1, 5000)
    middle = rng.choice([b"", data[at : at + size] * 2, rng.randbytes(size)])
    return data[:at] + middle + data[at + size :]


def misdescribed(data: bytes, rng: random.Random) -> bytes:
    """One field of one entry replaced."""
    header, body = split(data)
    entry = header[rng.choice([key for key in header if key != "__metadata__"])]
    field = rng.choice(["dtype", "shape", "data_offsets"])
    value = rng.choice([*JUNK, "I8", "F8_E4M3", "BF16", "F32", "Q4"])
    if field != "dtype" and rng.random() < 0.7 and entry[field]:
        entry[field][rng.randrange(len(entry[field]))] = value
    elif rng.random() < 0.1:
        del entry[field]
    else:
        entry[field] = value
    return joined(header, body)


def reshaped(data: bytes, rng: random.Random) -> bytes:
    """The same bytes under another shape or dtype of the same width."""
    header, body = split(data)
    for key in rng.sample([key for key in header if key != "__metadata__"], 3):
        shape, dtype = header[key]["shape"], header[key]["dtype"]
        choices = [shape[::-1], [1, *shape], [*shape, 1], [torch.Size(shape).numel()]]
        header[key]["shape"] = rng.choice(choices)
        header[key]["dtype"] = {"F16": rng.choice(["F16", "BF16", "I16", "U16"])}.get(dtype, dtype)
    return joined(header, body)


def renamed(data: bytes, rng: random.Random) -> bytes:
    """Some tensors under another name: numbers changed, words cut, names exchanged."""
    header, body = split(data)
    keys = [key for key in header if key != "__metadata__"]
    for key in rng.sample(keys, rng.choice([1, 1, 2, 20])):
        digits = [i for i, letter in enumerate(key) if letter.isdigit()]
        changes = [
            key + rng.choice(["x", ".lora_A", "\ud800", "\n", "0"]), key[rng.randrange(1, 30) :],
            rng.choice(keys) + ".", "".join(rng.choices("abc.019", k=600)),
        ]  # fmt: skip
        if digits:
            at = rng.choice(digits)
            number = rng.choice(["9", "99999999", "\u0663", "", "-1", "1" * 400])
            changes += [key[:at] + number + key[at + 1 :]] * 3
        header[rng.choice(changes)] = header.pop(key)
    return joined(header, body)


def repacked(data: bytes, rng: random.Random) -> bytes:
    """A well-formed file in which some tensors are missing, twice there, or empty."""
    header, body = split(data)
    result, parts, end = {key: header[key] for key in header if key == "__metadata__"}, [], 0
    pick = set(rng.sample(sorted(header), rng.choice([1, 2, 50])))
    kind = rng.choice(["drop", "double", "empty"])
    for key, entry in header.items():
        if key == "__metadata__" or (key in pick and kind == "drop"):
            continue
        begin, stop = entry["data_offsets"]
        if key in pick and kind == "empty":
            entry, begin, stop = entry | {"shape": [0, *entry["shape"][1:]]}, 0, 0
        for name in [key, key + ".copy"] if key in pick and kind == "double" else [key]:
            result[name] = entry | {"data_offsets": [end, end + stop - begin]}
            parts.append(body[begin:stop])
            end += stop - begin
    return joined(result, b"".join(parts))


def reconfigured(data: bytes, rng: random.Random) -> bytes:
    """Nonsense in the metadata."""
    header, body = split(data)
    config = json.loads(header.get("__metadata__", {}).get("hybridiff.config", "{}"))
    table = rng.choice(["unet", "mmdit", "vae", "clip_l", "clip_g", "t5", "defaults", None])
    names = [
        "head_width",
        "heads",
        "groups",
        "scaling",
        "shift",
        "activation",
        "max_distance",
        "prompt",
        "height",
    ]
    if table is None:
        config[rng.choice(["t5_length", "defaults", "vae", "family"])] = rng.choice(JUNK)
    else:
        config[table] = {rng.choice(names): rng.choice(JUNK)}
    text = rng.choice([json.dumps(config)] * 8 + ["{", "[1]", "[" * 5000])
    header["__metadata__"] = rng.choice([{"hybridiff.config": text}] * 8 + JUNK)
    return joined(header, body)


def numbered(data: bytes, rng: random.Random) -> bytes:
    """Thousands of empty tensors that count blocks up: a small file that describes a huge network."""
    header, body = split(data)
    key = rng.choice([key for key in header if re.search(r"\.\d+\.", key)])
    start, _, rest = re.split(r"\.(\d+)\.", key, maxsplit=1)
    for i in range(2000):
        header.setdefault(f"{start}.{i}.{rest}", {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]})
    return joined(header, body)


def foreign(data: bytes, rng: random.Random) -> bytes:
    return rng.choice(FOREIGN)


MUTATIONS = (
    truncated,
    extended,
    flipped,
    scrambled,
    misdescribed,
    reshaped,
    renamed,
    repacked,
    reconfigured,
    numbered,
    foreign,
)


def outcome(path: Path) -> str:
    """Opens, describes and loads a file as a run would: "loaded" or the sentence; other exceptions get through."""
    try:
        checkpoint = open_checkpoint(str(path))
        describe(checkpoint)
        for part in checkpoint.parts:
            checkpoint.load(part, torch.float32)
        return "loaded"
    except WeightsError as error:
        return str(error)


def acceptable(sentence: str) -> bool:
    """Short, of one line, and printable on any terminal."""
    return len(sentence) < 1500 and sentence.isascii() and sentence.isprintable()
