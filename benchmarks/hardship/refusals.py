"""Every kind of bad input through torchrun on two ranks: `python benchmarks/hardship/refusals.py`.

For each: one sentence of ours on stderr, exit status not 0 on both ranks, no traceback of ours, nothing written, and the seconds
until torchrun is gone (of which its own start and the import of torch are most). Exit status 1 if one of these fails, or
if one took longer than --seconds.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import in_words, machine, table  # noqa: E402
from tests.processes import torchrun  # noqa: E402
from tests.small import random_states, write_folder, write_single  # noqa: E402

SCRIPT = ROOT / "train_free_sample.py"


def damaged(folder: Path) -> dict[str, Path]:
    """What is wrong -> a file or folder that has it."""
    states = random_states("sdxl", torch.float16)
    good = write_single(folder / "good.safetensors", "sdxl", states)
    data, whole = good.read_bytes(), load_file(good)
    other = load_file(write_single(folder / "sd3.safetensors", "sd3", random_states("sd3", torch.float16)))
    first = next(key for key in whole if key.startswith("model.diffusion_model.") and whole[key].ndim == 4)

    def tensors(name: str, content: dict) -> Path:
        save_file(content, folder / name)
        return folder / name

    def raw(name: str, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    kinds = {
        "no such file": folder / "nothing.safetensors",
        "truncated in the header": raw("a.safetensors", data[:500]),
        "truncated in the tensors": raw("b.safetensors", data[: len(data) // 2]),
        "empty": raw("c.safetensors", b""),
        "a web page": raw("d.safetensors", b"<!DOCTYPE html><html>log in</html>"),
        "a pickle": raw("e.safetensors", b"\x80\x02}q\x00."),
        "a zip of PyTorch": raw("f.ckpt", b"PK\x03\x04" + b"\0" * 99),
        "a header of a terabyte": raw("g.safetensors", (2**40).to_bytes(8, "little") + b"{}" * 50),
        "a missing tensor": tensors(
            "h.safetensors", {key: value for key, value in whole.items() if key != first}
        ),
        "a tensor too many": tensors(
            "i.safetensors", whole | {"model.diffusion_model.extra.weight": whole[first].clone()}
        ),
        "a wrong shape": tensors("j.safetensors", whole | {first: whole[first][:1].clone()}),
        "whole numbers for weights": tensors("k.safetensors", whole | {first: whole[first].to(torch.int32)}),
        "parts of two families": tensors(
            "l.safetensors", other | {key: value for key, value in whole.items() if "diffusion_model" in key}
        ),
        "a LoRA": tensors("m.safetensors", {"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(4, 4)}),
        "an autoencoder alone": tensors(
            "n.safetensors", {key: value for key, value in whole.items() if "first_stage" in key}
        ),
        "a Flux model": tensors("o.safetensors", {"double_blocks.0.img_attn.qkv.weight": torch.zeros(4, 4)}),
        "an empty folder": folder / "empty",
    }
    (folder / "empty").mkdir()
    write_folder(folder / "half", "sdxl", {"denoiser": states["denoiser"]})
    kinds["a folder without its parts"] = folder / "half"
    if os.geteuid():  # root may read everything
        kinds["no permission"] = raw("p.safetensors", data)
        kinds["no permission"].chmod(0)
    return kinds


def refuse(options: list[str], folder: Path) -> dict:
    """What torchrun says and how long it takes."""
    before = sorted(path.name for path in folder.iterdir())
    start = time.monotonic()
    ran = torchrun(*options, "--out", str(folder / "picture.png"))
    seconds = time.monotonic() - start
    said = [line for line in ran.stderr.splitlines() if line.startswith("train_free_sample.py: ")]
    codes = re.findall(r"exitcode  : (-?\d+)", ran.stderr)
    wrong = []
    if ran.returncode == 0 or not codes or "0" in codes:
        wrong.append("exit status")
    if len(said) != 1:
        wrong.append(f"{len(said)} sentences")
    if f'{SCRIPT}", line' in ran.stderr:
        wrong.append("a traceback")
    if sorted(path.name for path in folder.iterdir()) != before:
        wrong.append("something written")
    return {
        "seconds": seconds,
        "said": said[0].partition(": ")[2].replace(str(folder), "...") if said else "",
        "wrong": ", ".join(wrong),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="the longest that a refusal may take")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = {kind: ["--weights", str(path)] for kind, path in damaged(folder).items()}
        options = (
            "--steps 0",
            "--height 100",
            "--unknown",
            "--sampler heun",
            "--preset quick",
            "--cap 9",
            "--seed -1",
            "--guidance nan",
        )
        cases |= {given: given.split() for given in options}
        for kind, given in cases.items():
            found[kind] = refuse(given, folder)
            if found[kind]["seconds"] > args.seconds:
                found[kind]["wrong"] = (found[kind]["wrong"] + " slow").strip()
            print(
                f"{kind}: {found[kind]['seconds']:.1f} s {found[kind]['wrong']}", file=sys.stderr, flush=True
            )
    lines = [
        [kind, f"{result['seconds']:.1f}", result["wrong"] or "as it should be", result["said"][:150]]
        for kind, result in found.items()
    ]
    print(
        in_words(machine() | {"ranks": 2})
        + "\n\n"
        + table(["input", "seconds", "verdict", "the sentence"], lines)
    )
    if args.json:
        args.json.write_text(json.dumps({"conditions": machine(), "results": found}, indent=1) + "\n")
    return 1 if any(result["wrong"] for result in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
