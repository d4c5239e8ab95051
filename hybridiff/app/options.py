"""The command line's options: names, types, choices and help. Ranges are checked by `hybridiff.request`, files by prepare.py."""

import argparse
import difflib
import re
import sys
from datetime import timedelta
from pathlib import Path

from hybridiff.errors import UsageError, printable
from hybridiff.presets import PRESETS
from hybridiff.request import DTYPES


class Parser(argparse.ArgumentParser):
    """Raises UsageError, so that rank 0 alone speaks."""

    def error(self, message: str):
        lacks = re.fullmatch(r"argument (--[\w-]+): expected .*argument", message)
        after = sys.argv[sys.argv.index(lacks[1]) + 1 :][:1] if lacks and lacks[1] in sys.argv else []
        if after and after[0].startswith("-") and after[0].split("=")[0] not in self._option_string_actions:
            message = f'{message} (one that begins with "-" is written with "=": {lacks[1]}="{after[0]}")'
        raise UsageError(f"{printable(message)}; see --help.")

    def parse_args(self) -> argparse.Namespace:
        """The options; also `given`, the names of those that are not at their defaults."""
        args, unknown = self.parse_known_args()
        if unknown:
            raise UsageError(self.unknown(unknown))
        args.given = [name for name, value in vars(args).items() if value != self.get_default(name)]
        return args

    def unknown(self, words: list[str]) -> str:
        """A sentence on what nobody knows in the command line, with the nearest option."""
        name = words[0].partition("=")[0]
        if not name.startswith("-"):
            return f"{printable(' '.join(words), 100)} belongs to no option: put quotes around a text of several words; see --help."
        options = {option.strip("-"): option for option in self._option_string_actions}
        asked = name.strip("-").lower()
        near = [option for option in options if option.startswith(asked)] or difflib.get_close_matches(
            asked, options, 1
        )
        return f"There is no option {printable(name, 100)}{f': did you mean {options[near[0]]}?' if near else '.'} See --help."


def as_utf8(text: str) -> str:
    """An argument read as UTF-8 also where the locale is another, such as C; unchanged where it is none (`check_text` refuses it)."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return text


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        usage="%(prog)s [options]",
        description="Make a picture with one process or with torchrun on two ranks or more.",
        allow_abbrev=False,
    )
    add = parser.add_argument_group("the checkpoint").add_argument
    add(
        "--weights",
        default="demo-sdxl",
        help="demo-sdxl, demo-sd3, a .safetensors file, a folder or a hub id (default: demo-sdxl)",
    )
    add(
        "--check",
        action="store_true",
        help="only say what the checkpoint holds and lacks (reads headers, no tensors)",
    )
    add(
        "--text-encoders",
        nargs="+",
        default=(),
        metavar="FILE",
        help="clip_l, clip_g, t5xxl in files of their own",
    )
    add("--t5-tokenizer", metavar="FILE", help="T5's spiece.model, if not beside the checkpoint")
    add("--no-t5", action="store_true", help="leave T5 out (SD3)")
    add(
        "--t5",
        type=str.lower,
        choices=("device", "cpu", "fp8"),
        default="device",
        help="where T5 runs: on the device (the default), on the CPU, or on the device in its stored fp8 (SD3)",
    )
    add = parser.add_argument_group("the picture").add_argument
    add(
        "--prompt",
        type=as_utf8,
        action="append",
        help="what to draw (default: the demo's own prompt; with other weights nothing); several make several pictures",
    )
    add("--negative-prompt", type=as_utf8, help="what to keep out")
    add("--height", type=int, help="pixels (default: the checkpoint's)")
    add("--width", type=int, help="pixels (default: the checkpoint's)")
    add("--seed", type=int, help="0 to 2**63 - 1; drawn and printed if not given")
    add("--steps", type=int, default=50, help="of the sampler (default: 50)")
    add(
        "--guidance",
        type=float,
        help="scale of guidance; 1 or less means none (default: the checkpoint's or family's)",
    )
    add(
        "--sampler",
        type=str.lower,
        help="ddim, euler or dpmpp_2m (SDXL), flow or dpmpp_2m (SD3); the first is the default",
    )
    add = parser.add_argument_group("several pictures").add_argument
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a prompt a line, or JSON lines with prompt, negative_prompt, seed, height, width, guidance",
    )
    add(
        "--images-per-prompt",
        type=int,
        default=1,
        metavar="N",
        help="pictures of each prompt; the seed goes up by one (default: 1)",
    )
    add("--resume", action="store_true", help="go on with several pictures where a run was cut short")
    add(
        "--layout",
        type=str.lower,
        choices=("pairs", "layers"),
        help="one picture on all ranks (layers), or one a pair of ranks (default: pairs for several pictures)",
    )
    add = parser.add_argument_group("how it is shared").add_argument
    add(
        "--preset",
        default="balanced",
        type=str.lower,
        choices=PRESETS,
        help="; ".join(f"{name}: {preset.words}" for name, preset in PRESETS.items())
        + " (default: balanced)",
    )
    add(
        "--strategy",
        type=str.lower,
        help="instead of the preset's: serial, batched (one process); condition, paper, step-extrapolation, inner-reuse, "
        "guided-pipeline (one process or two ranks; the first three also more)",
    )
    add(
        "--explain",
        action="store_true",
        help="only print the schedule: operations, timeline, ideal cost, bytes",
    )
    add(
        "--skipped",
        "--reused",
        type=int,
        help="steps that step-extrapolation, inner-reuse and guided-pipeline skip (default: the preset's share)",
    )
    add(
        "--full-first",
        type=int,
        help="full steps before those that may be skipped (default: 5 and a fifth of the steps)",
    )
    add(
        "--window",
        type=int,
        help="L: steps over which the slope is averaged (default: the paper's, scaled from 50 steps)",
    )
    add(
        "--slope",
        type=float,
        help="g: switch when the fall a step is below it (default: the paper's, scaled from 50 steps)",
    )
    add(
        "--cap",
        type=int,
        help="tau_cap: switch here at the latest (default: the paper's, scaled from 50 steps)",
    )
    add("--interval", type=int, help="k: tau2 = tau1 + k (default: the paper's, scaled from 50 steps)")
    add(
        "--balance",
        action="store_true",
        help="choose where paper cuts the network from the measured times of its parts, for devices that are not alike",
    )
    add = parser.add_argument_group("the machine").add_argument
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add(
        "--dtype",
        type=str.lower,
        choices=DTYPES,
        help="of the networks (default: float32 on CPU; on CUDA bfloat16 if the denoiser is stored so, else float16)",
    )
    add("--threads", type=int, default=1, help="torch's threads a process on the CPU (default: 1)")
    add("--tiles", action="store_true", help="decode pictures above 1 megapixel in tiles (less memory)")
    add(
        "--transport",
        type=str.lower,
        choices=("auto", "nccl", "gloo"),
        default="auto",
        help="how ranks send: auto (the default) is nccl where each has a GPU of its own, else gloo",
    )
    add("--timeout", type=float, default=600.0, help="seconds to wait for a silent rank (default: 600)")
    add = parser.add_argument_group("what is written").add_argument
    add(
        "--out",
        type=Path,
        help="where the picture goes, as PNG, JPEG or WebP by its name (default: picture.png, or, without --overwrite, the next free number); for several pictures a folder (default: pictures)",
    )
    add("--overwrite", action="store_true", help="let --out, --report and --save-latents replace files")
    add("--save-latents", type=Path, metavar="FILE", help="also keep the latents, for --decode")
    add("--decode", type=Path, metavar="FILE", help="only make the picture of kept latents")
    add("--report", type=Path, metavar="DIR", help="write DIR/report.json and DIR/report.html")
    add(
        "--compare-serial",
        action="store_true",
        help="for the report, make the picture by serial too (rank 0)",
    )
    add(
        "--quiet",
        action="store_true",
        help="on stdout only the path of the picture, or of the manifest of several; errors on stderr",
    )
    return parser.parse_args()


def asked_timeout() -> timedelta:
    """--timeout, which is needed before the ranks can talk about any option; a bad value is refused later with the others."""
    early = Parser(add_help=False, allow_abbrev=False)
    early.add_argument("--timeout")
    try:
        seconds = float(early.parse_known_args()[0].timeout or 600)
    except (ValueError, UsageError):
        seconds = 600.0
    return timedelta(seconds=seconds if 0.1 <= seconds <= 1e6 else 600.0)
