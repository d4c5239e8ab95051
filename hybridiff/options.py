"""The command line's options: what may be said, what it means where nothing is said, and what is refused before any work."""

import argparse
import difflib
import os
import re
import secrets
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch

from hybridiff.batch import is_comment, read_prompts, text_of_prompts
from hybridiff.ending import shown
from hybridiff.errors import UsageError
from hybridiff.memory import refuse_too_large
from hybridiff.pipeline import Request, plan_request
from hybridiff.presets import PRESETS, paper_rule, usual_reuse
from hybridiff.report import (
    PICTURE,
    PICTURES,
    check_picture,
    check_writable,
    free_name,
    picture_format,
    read_text,
    settings_of,
    this_run,
)
from hybridiff.samplers import SAMPLERS, TRAINING_STEPS
from hybridiff.strategies import STRATEGIES
from hybridiff.transport import Transport, place
from weights.describe import left_out, needs, where_to_get
from weights.load import Checkpoint, open_checkpoint

SAVING = (
    "step-extrapolation",
    "inner-reuse",
    "guided-pipeline",
)  # the strategies that --full-first and --reused steer
OF_DECODING = (
    "decode",
    "weights",
    "text_encoders",
    "t5_tokenizer",
    "no_t5",
    "device",
    "threads",
    "tiles",
    "timeout",
    "out",
    "overwrite",
    "quiet",
)  # options that go with --decode
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Parser(argparse.ArgumentParser):
    """Raises UsageError, so that rank 0 alone speaks."""

    def error(self, message: str):
        lacks = re.fullmatch(r"argument (--[\w-]+): expected .*argument", message)
        after = sys.argv[sys.argv.index(lacks[1]) + 1 :][:1] if lacks and lacks[1] in sys.argv else []
        if after and after[0].startswith("-") and after[0].split("=")[0] not in self._option_string_actions:
            message = f'{message} (one that begins with "-" is written with "=": {lacks[1]}="{after[0]}")'
        raise UsageError(f"{shown(message)}; see --help.")

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
            return f"{shown(' '.join(words), 100)} belongs to no option: put quotes around a text of several words; see --help."
        options = {option.strip("-"): option for option in self._option_string_actions}
        near = difflib.get_close_matches(name.strip("-").lower(), options, 1)
        return f"There is no option {shown(name, 100)}{f': did you mean {options[near[0]]}?' if near else '.'} See --help."


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
        "--reused",
        type=int,
        help="steps that step-extrapolation, inner-reuse and guided-pipeline save (default: the preset's share)",
    )
    add(
        "--full-first",
        type=int,
        help="full steps before those that may be saved (default: 5 and a fifth of the steps)",
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


def choose_device(name: str | None) -> torch.device:
    """The device asked for; by default this rank's share of the GPUs, or the CPU."""
    gpus = torch.cuda.device_count()
    if name in (None, "cuda"):
        if name == "cuda" and not gpus:
            raise UsageError("--device cuda: there is no CUDA device here; use --device cpu.")
        return torch.device("cuda", place()[2] % gpus) if gpus else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
    except (RuntimeError, AssertionError):
        raise UsageError(f"--device {shown(name)} is not there: use cpu or cuda.") from None
    return device


def check_text(name: str, text: str | None) -> None:
    """UsageError where a text has lone surrogates: bytes of the command line that are no UTF-8, or half of a pair in JSON."""
    for number, character in enumerate(text or "", 1):
        if "\ud800" <= character <= "\udfff":
            raise UsageError(
                f"{name} is no Unicode text at its character {number} (U+{ord(character):04X} alone): write it in UTF-8."
            )


def usual_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """fp32 on the CPU, where many are slow in anything else; on CUDA bf16 where the denoiser is stored in it, else fp16."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if checkpoint.dtype("denoiser") == torch.bfloat16 else torch.float16


def make_request(
    args: argparse.Namespace, checkpoint: Checkpoint, device: torch.device, own: dict
) -> Request:
    """What a picture has of its `own`, else the options, and where none is given the checkpoint's defaults, then the family's."""
    args = argparse.Namespace(**vars(args) | {"prompt": None} | own)
    model, defaults = checkpoint.model, checkpoint.defaults

    def either(name: str, fallback: object) -> object:
        given = getattr(args, name)
        return given if given is not None else defaults.get(name, fallback)

    for name in ("prompt", "negative_prompt"):
        check_text(f"--{name.replace('_', '-')}", getattr(args, name))
    if not 1 <= args.steps < TRAINING_STEPS:
        raise UsageError(
            f"--steps {shown(str(args.steps), 20)} is out of range: give a number from 1 to {TRAINING_STEPS - 1}."
        )
    given_rule = {key: getattr(args, key) for key in ("window", "slope", "cap", "interval")}
    rule = replace(
        paper_rule(model.switch, args.steps),
        **{key: value for key, value in given_rule.items() if value is not None},
    )
    strategy = args.strategy or PRESETS[args.preset].strategy
    for names, whose in (
        (("window", "slope", "cap", "interval"), ("paper",)),
        (("full_first", "reused"), SAVING),
    ):
        for name in names:
            if (
                getattr(args, name) is not None and strategy in STRATEGIES and strategy not in whose
            ):  # an unknown strategy is refused as such
                raise UsageError(
                    f"--{name.replace('_', '-')} has no effect with strategy {strategy}: add --strategy {whose[0]}, or leave it out."
                )
    guidance = either("guidance", model.guidance)
    if guidance <= 1 and args.negative_prompt:
        raise UsageError(
            f"--negative-prompt has no effect with guidance {guidance:g}, as 1 or less means no guidance: leave it out, or give more --guidance."
        )
    if guidance <= 1 and strategy in STRATEGIES:
        strategy = "one-branch"
    usual = usual_reuse(args.steps, PRESETS[args.preset].share or PRESETS["balanced"].share, args.full_first)
    room = len(usual.choices(args.steps))
    if args.reused is not None and args.reused > room:
        kept = f"the first {usual.start} and the last {usual.end} of {args.steps} steps"
        raise UsageError(
            f"--reused {args.reused} is out of range: give at most {room}, as {kept} are never saved."
        )
    if args.seed is not None and not 0 <= args.seed < 2**63:
        raise UsageError(f"--seed {args.seed} is out of range: give a number from 0 to 2**63 - 1.")
    if args.compare_serial and not args.report:
        raise UsageError("--compare-serial goes into the report: give --report DIR too.")
    if not 0.1 <= args.timeout <= 1e6:
        raise UsageError(f"--timeout {args.timeout} is out of range: give seconds, 0.1 to 1e6.")
    if args.threads < 1:
        raise UsageError(f"--threads {args.threads} is out of range: give at least 1.")
    return Request(
        prompt=either("prompt", ""),
        negative_prompt=args.negative_prompt,
        steps=args.steps,
        guidance=guidance,
        height=either("height", model.size["height"]),
        width=either("width", model.size["width"]),
        seed=secrets.randbelow(2**32) if args.seed is None else args.seed,
        sampler=args.sampler or next(iter(SAMPLERS[model.prediction])),
        strategy=strategy,
        rule=rule,
        dtype=DTYPES[args.dtype] if args.dtype else usual_dtype(checkpoint, device),
        tiles=args.tiles,
        t5=None if args.t5 == "device" and "t5" not in checkpoint.parts else args.t5,
        balance=args.balance,
        reuse=usual if args.reused is None else replace(usual, count=args.reused),
    )


def team_size(args: argparse.Namespace, ranks: int, world: int) -> int:
    """How many ranks make one picture together, of `world`; `ranks` is what the strategy is written for."""
    if (args.layout or ("pairs" if args.several else "layers")) == "layers" or world == 1:
        return world
    if world % ranks:
        raise UsageError(
            f"{world} ranks do not make teams of {ranks}: set --nproc_per_node to a multiple of {ranks}."
        )
    return ranks


def that_can_be_made(
    args: argparse.Namespace, checkpoint: Checkpoint, device: torch.device, world: int
) -> list[Request]:
    """The requests of all pictures that can be made; UsageError if there is none (else the others fail at their turn). Sets args.team_size, and args.plans: the strategies in words."""
    known, problems, good = [], [], []
    for own in args.told:
        try:
            request = make_request(args, checkpoint, device, own)
            known.append((request, plan_request(checkpoint, request, world=None)[0].ranks))
        except UsageError as error:
            problems.append(error)
    if known:
        args.team_size = team_size(args, max(ranks for _, ranks in known), world)
    for request, _ in known:
        try:
            plan_request(checkpoint, request, args.team_size)
            good.append(request)
        except UsageError as error:
            problems.append(error)
    if not good:
        raise problems[0]
    args.plans = " or ".join(dict.fromkeys(map(numbers, good)))
    return good


def check_several(args: argparse.Namespace) -> None:
    """UsageError in what cannot be had with several pictures, and where their folder cannot be made."""
    for name in ("report", "save_latents", "compare_serial", "explain", "decode", "balance"):
        if getattr(args, name):
            raise UsageError(
                f"--{name.replace('_', '-')} is for one picture: leave it out, or ask for one prompt."
            )
    if not 1 <= args.images_per_prompt <= 10**6:
        raise UsageError(f"--images-per-prompt {args.images_per_prompt} is out of range: give 1 to 1000000.")
    args.out = args.out or Path("pictures")
    if args.out.suffix.lower() in PICTURES and not args.out.is_dir():
        raise UsageError(
            f"--out {shown(str(args.out))} is the name of one picture, and several go into a folder: give the name of a folder."
        )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--out {args.out} cannot be made a folder ({error.strerror}); several pictures go into one."
        ) from None
    check_writable(args.out / "manifest.jsonl", overwrite=True)


def finished_before(args: argparse.Namespace) -> Path | None:
    """The picture, if an attempt of this run that torchrun has restarted since made it. UsageError where more than the picture is wanted and lacks."""
    run = this_run()
    candidates = [args.out] if args.out else sorted(Path().glob(f"{PICTURE.stem}*{PICTURE.suffix}"))
    found = next((path for path in candidates if run and read_text(path).get("run") == run), None)
    if found is None:
        return None
    reports = [args.report / name for name in ("report.json", "report.html")] if args.report else []
    for path in filter(None, (args.save_latents, *reports)):  # written after the picture
        if not path.exists() or path.stat().st_mtime < found.stat().st_mtime:
            seed = read_text(found)["seed"]
            raise UsageError(
                f"{found} was made before this run was restarted, but not {path}: make both with --seed {seed} --out {found} --overwrite."
            )
    return found


def started_without_torchrun() -> str | None:
    """What to do where another launcher has started several tasks, which would each make the whole picture; None where it is not so."""
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        tasks = os.environ.get(name, "")
        if tasks.isdecimal() and int(tasks) > 1 and "RANK" not in os.environ:
            return (
                f"{tasks} tasks are started here ({name}), but not as ranks, so that each would make the whole picture: start one task a"
                f" machine, and in it torchrun --nproc_per_node={tasks} train_free_sample.py (with --nnodes on several machines)."
            )
    return None


def prepare(transport: Transport) -> tuple[argparse.Namespace, Checkpoint, Request | None, torch.device]:
    """Everything that can be refused is refused here, before any long work. No request where only --check is asked for."""
    device = None
    try:
        args = parse_arguments()
        device = choose_device(args.device)
    finally:
        transport.locate(device)  # also where the options are refused: the other ranks wait for it
    checkpoint = open_checkpoint(args.weights, args.text_encoders, args.t5_tokenizer)
    if args.no_t5:
        checkpoint.leave_out("t5")
    if args.check:
        return args, checkpoint, None, device
    if args.decode and (others := [name for name in args.given if name not in OF_DECODING]):
        raise UsageError(
            f"--{others[0].replace('_', '-')} has no effect with --decode, which only decodes a picture: leave one of them out."
        )
    sends = not args.explain and not args.decode
    for part in left_out(checkpoint) if not args.no_t5 else ():
        why = where_to_get(checkpoint, part).rstrip(".")
        checkpoint.remarks = [*checkpoint.remarks, f"The picture is made without {part.upper()} ({why})."]
    if lacking := needs(checkpoint) if not args.decode else []:
        raise UsageError(" ".join(lacking))
    text = text_of_prompts(args.prompts, transport.world) if args.prompts else ""
    args.told = [{"prompt": prompt} for prompt in args.prompt or ()] + (
        read_prompts(args.prompts, text) if args.prompts else []
    )
    args.comments = sum(map(is_comment, text.split("\n")))
    args.several = args.prompts is not None or len(args.told) > 1 or args.images_per_prompt != 1
    args.told = args.told or [{"prompt": checkpoint.defaults.get("prompt", "")}]
    requests = that_can_be_made(args, checkpoint, device, transport.world)
    if sends and args.transport == "nccl" and (problem := transport.nccl_problem(args.team_size)):
        raise UsageError(f"--transport nccl: {problem}; leave it out, or give --transport gloo.")
    request, largest = requests[0], max(requests, key=lambda request: request.height * request.width)
    if sends:
        ranks, sharing = transport.neighbours()
        refuse_too_large(checkpoint, largest, device, ranks, args.team_size, args.several, sharing)
    if args.resume and not args.several:
        raise UsageError(
            "--resume goes on with several pictures, and one is asked for: leave it out, or ask for more."
        )
    args.found, args.numbered = None, args.out is None and not args.overwrite
    if args.several:
        check_several(args)
    elif transport.rank == 0 and not args.explain:
        args.found = finished_before(args)
        if args.found:
            return args, checkpoint, request, device
        args.out = args.out or (PICTURE if args.overwrite else free_name(PICTURE))
        if args.save_latents and args.save_latents.resolve() == args.out.resolve():
            raise UsageError(
                f"--save-latents and --out are the same file, {shown(str(args.out))}: give each its own."
            )
        if args.decode:
            picture_format(args.out)
        else:
            check_picture(args.out, request.seed, settings_of(request, args.weights, transport.world))
        for path in filter(None, (args.out, args.save_latents)):
            check_writable(path, args.overwrite)
        if args.report:
            if args.report.suffix.lower() in (".html", ".json") and not args.report.is_dir():
                raise UsageError(
                    f"--report {shown(str(args.report))} is the name of a file, and the report goes into a folder: give the name of a folder."
                )
            try:
                args.report.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f"--report {args.report} cannot be made ({error.strerror}).") from None
            for name in ("report.json", "report.html"):
                check_writable(args.report / name, args.overwrite)
    return args, checkpoint, request, device


def numbers(request: Request) -> str:
    """The strategy with the numbers that it goes by."""
    rule, reuse = request.rule, request.reuse
    if request.strategy == "paper":
        return f"paper (window {rule.window}, slope {rule.slope:g}, cap {rule.cap}, interval {rule.interval})"
    if request.strategy == "one-branch":
        return f"one-branch (guidance {request.guidance:g} is none: there is nothing to split)"
    if request.strategy not in SAVING:
        return request.strategy
    steps = (
        reuse.consecutive(request.steps)
        if request.strategy == "guided-pipeline"
        else reuse.spread(request.steps)
    )
    return f"{request.strategy} ({len(steps)} of {request.steps} steps save work, the first {reuse.start} and the last {reuse.end} never)"


def asked_timeout() -> timedelta:
    """--timeout, which is needed before the ranks can talk about any option; a bad value is refused later with the others."""
    early = Parser(add_help=False, allow_abbrev=False)
    early.add_argument("--timeout")
    try:
        seconds = float(early.parse_known_args()[0].timeout or 600)
    except (ValueError, UsageError):
        seconds = 600.0
    return timedelta(seconds=seconds if 0.1 <= seconds <= 1e6 else 600.0)
