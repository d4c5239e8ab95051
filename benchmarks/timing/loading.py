"""Loads SDXL at its full size and measures seconds and memory: `python benchmarks/timing/loading.py --dir DIR`.

Writes DIR/sdxl-random.safetensors once (6.9 GB, the official names and shapes, random fp16 values from one repeated
block). Then, each in a process of its own with an empty page cache for the file (as far as the system lets it go):
reading every tensor once with safetensors; placing what a picture needs, one after the other, without running anything;
text encoders run, denoiser ready; the same in two processes at once. "Ready" is when the loader returns; "touched" when
every page of the denoiser is in memory; "cpu" the processor's own seconds until then. Linux only.
"""

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from hybridiff.text import encode  # noqa: E402
from tests.official import DTYPE_BYTES, tensors  # noqa: E402
from weights.load import open_checkpoint  # noqa: E402

NAME, BLOCK = "sdxl-random.safetensors", 2**24  # values in the random block
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def write_file(path: Path) -> None:
    """The full-size single file, a chunk at a time; refuses where the disk is too small."""
    wanted = tensors("sdxl-base-1.0.single")
    sizes = {name: math.prod(shape) * DTYPE_BYTES[dtype] for name, (dtype, shape) in wanted.items()}
    if path.exists() and path.stat().st_size > sum(sizes.values()):
        return
    free = shutil.disk_usage(path.parent).free
    if free < sum(sizes.values()) + 2**30:
        needed = sum(sizes.values()) / 1e9
        sys.exit(
            f"{path.parent} has {free / 1e9:.1f} GB free and {needed + 1:.1f} are needed: give another --dir."
        )
    header, end = {}, 0
    for name, (dtype, shape) in wanted.items():
        begin, end = end, end + sizes[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns its tensors
    block = (0.02 * torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))).half().numpy().tobytes()
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, (name, (dtype, _)) in enumerate(wanted.items()):
            left, start = sizes[name], 2 * (number * 7919 % 2**20)
            while left:
                piece = block[start : start + left] if dtype == "F16" else bytes(left)
                left, start = left - file.write(piece), 0
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)


def empty_cache(path: Path) -> None:
    """Ask the system to forget the pages of the file."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def touch(tensor: torch.Tensor) -> int:
    """Read a byte of every page of a tensor."""
    return int(tensor.flatten().view(torch.uint8)[::4096].sum())


def memory() -> dict[str, float]:
    """GB of this process: the most it ever had, what it has now, its share of it, and what is its own alone."""
    fields = {}
    for file in ("/proc/self/status", "/proc/self/smaps_rollup"):
        lines = [line.split() for line in Path(file).read_text().splitlines()]
        fields |= {line[0].rstrip(":"): int(line[1]) * 1024 / 1e9 for line in lines if line[-1] == "kB"}
    own = fields["Private_Clean"] + fields["Private_Dirty"]
    return {"peak": fields["VmHWM"], "resident": fields["Rss"], "proportional": fields["Pss"], "own": own,
            "anonymous": fields["Anonymous"]}  # fmt: skip


def read_once(path: Path) -> dict:
    """Every tensor of the file, read with safetensors."""
    start, cpu = time.perf_counter(), time.process_time()
    with safe_open(path, framework="pt", device="cpu") as file:
        for name in file.keys():
            touch(file.get_tensor(name))
    return {"read": time.perf_counter() - start, "cpu": time.process_time() - cpu, **memory()}


def load(path: Path, dtype: torch.dtype, run_text: bool) -> tuple[dict, object]:
    """What a rank does before its first step (without `run_text` its text encoders are only read); measured on a line from
    stdin, when all are ready.
    """
    start, cpu = time.perf_counter(), time.process_time()
    checkpoint = open_checkpoint(str(path))
    seconds, told = {"opened": time.perf_counter() - start}, None
    if run_text:
        told = encode(checkpoint, "a photo of a cat", None, 1024, 1024, torch.device("cpu"), dtype)
    else:
        for part in ("clip_l", "clip_g"):
            checkpoint.tokenizer(part)
            for tensor in checkpoint.load(part, dtype).state_dict().values():
                touch(tensor)
    seconds["text encoders done"] = time.perf_counter() - start
    text_peak = memory()["peak"]
    denoiser = checkpoint.load("denoiser", dtype)
    seconds["denoiser ready"] = time.perf_counter() - start
    for tensor in denoiser.state_dict().values():
        touch(tensor)
    seconds |= {"denoiser touched": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    print("ready", flush=True)
    sys.stdin.readline()
    return {**seconds, "peak with text encoders": text_peak, **memory()}, (told, denoiser)


def run(child: str, path: Path, dtype: str, count: int) -> list[dict]:
    """Results of `count` processes of this file that run at once; none ends before all are ready."""
    command = [sys.executable, __file__, "--dir", str(path.parent), "--dtype", dtype, "--child", child]
    empty_cache(path)
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    children = [subprocess.Popen(command, **pipes) for _ in range(count)]
    if child != "read":
        for process in children:
            process.stdout.readline()
        for process in children:
            process.stdin.write("\n")
            process.stdin.flush()
            process.result = process.stdout.readline()
    else:
        for process in children:
            process.result = process.stdout.readline()
    results = [json.loads(process.result) for process in children]
    for process in children:
        process.stdin.close()
        process.wait()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--dir", type=Path, required=True, help="folder for the file of 6.9 GB, which stays there"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of the networks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--child", choices=("read", "place", "load"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = args.dir / NAME
    if args.child:
        result, kept = (
            (read_once(path), None)
            if args.child == "read"
            else load(path, DTYPES[args.dtype], args.child == "load")
        )
        print(json.dumps(result), flush=True)
        if args.child != "read":
            sys.stdin.readline()  # stay until the others were measured
            del kept
        return
    args.dir.mkdir(parents=True, exist_ok=True)
    write_file(path)
    runs = (("read once", "read", 1), ("placed, nothing run", "place", 1), ("read again", "read", 1))
    runs += (("one process", "load", 1), ("two processes", "load", 2))
    before = os.getloadavg()[0]
    rows = [(name, run(child, path, args.dtype, count)) for name, child, count in runs]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    conditions = {
        "file GB": path.stat().st_size / 1e9, "dtype": args.dtype, "cores": os.cpu_count(), "memory GB": pages,
        "load average before": before, "torch": torch.__version__, "python": platform.python_version(),
        "threads a process": 1,
    }  # fmt: skip
    print("; ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in conditions.items()))
    keys = [
        "read",
        "opened",
        "text encoders done",
        "denoiser ready",
        "denoiser touched",
        "cpu",
        "peak with text encoders",
    ]
    keys += ["peak", "resident", "proportional", "own", "anonymous"]
    print(
        "\nSeconds since the start, then GB\n\n| | " + " | ".join(keys) + " |\n|" + " --- |" * (len(keys) + 1)
    )
    for name, results in rows:
        for result in results:
            print(
                f"| {name} | "
                + " | ".join(f"{result[key]:.2f}" if key in result else "" for key in keys)
                + " |"
            )
    if args.json:
        args.json.write_text(json.dumps({"conditions": conditions, "results": dict(rows)}, indent=1))


if __name__ == "__main__":
    main()
