"""Names, shapes and maps of the official checkpoints, for the tests (see tests/data/README.md)."""

import gzip
import json
import math
from functools import cache
from pathlib import Path

DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "I32": 4, "I8": 1}


@cache
def data() -> dict:
    """The whole table."""
    return json.loads(gzip.decompress((Path(__file__).parent / "data" / "official.json.gz").read_bytes()))


def shapes(name: str, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Name -> shape of a file's tensors under a prefix, which is stripped."""
    found = data()["files"][name].items()
    return {key.removeprefix(prefix): tuple(shape) for key, (_, shape) in found if key.startswith(prefix)}


def write_sparse(
    path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict | None = None
) -> Path:
    """A safetensors file of full size, all zeros, that takes no room on the disk: name -> (dtype, shape)."""
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def tensors(name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of a file."""
    return {key: (dtype, tuple(shape)) for key, (dtype, shape) in data()["files"][name].items()}
