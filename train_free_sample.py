"""Make a picture with one process or with torchrun on two ranks.

    torchrun --nproc_per_node=2 train_free_sample.py                       # the SDXL demo, preset `balanced`
    torchrun --nproc_per_node=2 train_free_sample.py --weights demo-sd3    # the SD3 demo
    python train_free_sample.py                                            # the same schedule in one process
    torchrun --nproc_per_node=2 train_free_sample.py --weights sd_xl_base_1.0.safetensors --prompt "a red fox"
"""

import argparse
import os
import secrets
import signal
import sys
import time
import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while the packages are being imported ends without a traceback
    WORD = b"train_free_sample.py: interrupted\n" if os.environ.get("RANK", "0") == "0" else b""
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, WORD), os._exit(1)))

import torch
from tqdm import tqdm

import hybridiff
from hybridiff.batch import Job, Manifest, Progress, begin, line_of, make_jobs, read_prompts, take_turns
from hybridiff.denoise import StepRecord
from hybridiff.ending import end_on_interrupt, in_a_sentence, prepare_streams, say, shown
from hybridiff.errors import SharedError, UsageError
from hybridiff.latents import read_latents, save_both
from hybridiff.memory import refuse_too_large
from hybridiff.page import make_page, psnr, save_page
from hybridiff.pipeline import GUIDANCE, SIDE, Request, Result, decode, generate, meta_task, plan_request
from hybridiff.presets import PRESETS, paper_rule, usual_reuse
from hybridiff.report import check_writable, free_name, make_report, save_picture, save_report, settings_of
from hybridiff.samplers import SAMPLERS, TRAINING_STEPS
from hybridiff.strategies import Settings
from hybridiff.switching import find_switch
from hybridiff.timeline import explain
from hybridiff.transport import TRACE, Mailbox, PeerLost, Transport, connect, place
from weights.describe import describe, needs, where_to_get
from weights.load import Checkpoint, WeightsError, open_checkpoint

SAVING = ("step-extrapolation", "inner-reuse", "guided-pipeline")  # the strategies that --full-first and --reused steer
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Parser(argparse.ArgumentParser):
    """Raises UsageError, so that rank 0 alone speaks."""

    def error(self, message: str):
        raise UsageError(f"{shown(message)}; see --help.")


def as_utf8(text: str) -> str:
    """An argument read as UTF-8 also where the locale is another, such as C; unchanged where it is none (`check_text` refuses it)."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return text


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--weights", default="demo-sdxl", help="demo-sdxl, demo-sd3, a .safetensors file, a folder or a hub id")
    add("--check", action="store_true", help="only say what the checkpoint holds and lacks (reads headers, no tensors)")
    add("--explain", action="store_true", help="only print the schedule: operations, timeline, ideal cost, bytes")
    add("--text-encoders", nargs="+", default=(), metavar="FILE", help="clip_l, clip_g, t5xxl in files of their own")
    add("--t5-tokenizer", metavar="FILE", help="T5's spiece.model, if not beside the checkpoint")
    add("--no-t5", action="store_true", help="leave T5 out (SD3)")
    add("--t5", choices=("device", "cpu", "fp8"), default="device", help="where T5 runs: on the device, on the CPU, or on the device in its stored fp8 (SD3)")
    add("--prompt", type=as_utf8, action="append", help="what to draw (default: the demo's own prompt); several make several pictures")
    add("--prompts", type=Path, metavar="FILE", help="a prompt a line, or JSON lines with prompt, negative_prompt, seed, height, width, guidance")
    add("--images-per-prompt", type=int, default=1, metavar="N", help="pictures of each prompt; the seed goes up by one")
    add("--negative-prompt", type=as_utf8, help="what to keep out")
    add("--steps", type=int, default=50)
    add("--guidance", type=float, help="scale of guidance; 1 or less means none (default: the checkpoint's or family's)")
    add("--height", type=int, help="pixels (default: the checkpoint's)")
    add("--width", type=int, help="pixels (default: the checkpoint's)")
    add("--seed", type=int, help="0 to 2**63 - 1; drawn and printed if not given")
    add("--sampler", help="ddim, euler or dpmpp_2m (SDXL), flow or dpmpp_2m (SD3); the first is the default")
    add("--preset", default="balanced", choices=PRESETS, help="; ".join(f"{name}: {preset.words}" for name, preset in PRESETS.items()))
    add("--strategy", help="instead of the preset's: serial, batched (one process); condition, paper, step-extrapolation, inner-reuse, "
        "guided-pipeline (one process or two ranks)")
    add("--reused", type=int, help="steps that our strategies save (default: the preset's share)")
    add("--full-first", type=int, help="full steps before the first saved one (default: 30%% of the steps)")
    add("--window", type=int, help="L: steps over which the slope is averaged (default: the paper's, scaled from 50 steps)")
    add("--slope", type=float, help="g: switch when the fall a step is below it (default: the paper's, scaled from 50 steps)")
    add("--cap", type=int, help="tau_cap: switch here at the latest (default: the paper's, scaled from 50 steps)")
    add("--interval", type=int, help="k: tau2 = tau1 + k (default: the paper's, scaled from 50 steps)")
    add("--dtype", choices=DTYPES, help="of the networks (default: float32 on CPU; on CUDA bfloat16 if the denoiser is stored so, else float16)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--threads", type=int, default=1, help="torch's threads a process on the CPU")
    add("--tiles", action="store_true", help="decode pictures above 1 megapixel in tiles (less memory)")
    add("--transport", choices=("auto", "nccl", "gloo"), default="auto", help="how ranks send: auto is nccl where each has a GPU of its own, else gloo")
    add("--timeout", type=float, default=600.0, help="seconds to wait for a silent rank")
    add("--out", type=Path, help="where the PNG goes (default: picture.png, or the next free number); for several pictures a folder (default: pictures)")
    add("--resume", action="store_true", help="go on with several pictures where a run was cut short")
    add("--layout", choices=("pairs", "layers"), help="one picture on all ranks (layers), or one a pair of ranks (default: pairs for several pictures)")
    add("--overwrite", action="store_true", help="let --out, --report and --save-latents replace files")
    add("--save-latents", type=Path, metavar="FILE", help="also keep the latents, for --decode")
    add("--decode", type=Path, metavar="FILE", help="only make the picture of kept latents")
    add("--report", type=Path, metavar="DIR", help="write DIR/report.json and DIR/report.html")
    add("--compare-serial", action="store_true", help="for the report, make the picture by serial too (rank 0)")
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
    for place, character in enumerate(text or "", 1):
        if "\ud800" <= character <= "\udfff":
            raise UsageError(f"{name} is no Unicode text at its character {place} (U+{ord(character):04X} alone): write it in UTF-8.")


def usual_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """fp32 on the CPU, which is slow in anything else; on CUDA bf16 where the denoiser is stored in it, else fp16."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if checkpoint.dtype("denoiser") == torch.bfloat16 else torch.float16


def make_request(args: argparse.Namespace, checkpoint: Checkpoint, device: torch.device, own: dict) -> Request:
    """What a picture has of its `own`, else the options, and where none is given the checkpoint's defaults, then the family's."""
    args = argparse.Namespace(**vars(args) | {"prompt": None} | own)
    family, defaults = checkpoint.family, checkpoint.defaults

    def either(name: str, fallback: object) -> object:
        given = getattr(args, name)
        return given if given is not None else defaults.get(name, fallback)

    for name in ("prompt", "negative_prompt"):
        check_text(f"--{name.replace('_', '-')}", getattr(args, name))
    if not 1 <= args.steps < TRAINING_STEPS:
        raise UsageError(f"--steps {shown(str(args.steps), 20)} is out of range: give a number from 1 to {TRAINING_STEPS - 1}.")
    given_rule = {key: getattr(args, key) for key in ("window", "slope", "cap", "interval")}
    rule = replace(paper_rule(family, args.steps), **{key: value for key, value in given_rule.items() if value is not None})
    strategy = args.strategy or PRESETS[args.preset].strategy
    for names, whose in ((("window", "slope", "cap", "interval"), ("paper",)), (("full_first", "reused"), SAVING)):
        for name in names:
            if getattr(args, name) is not None and strategy not in whose:
                raise UsageError(f"--{name.replace('_', '-')} is no number of {strategy}: add --strategy {whose[0]}, or leave it out.")
    guidance = either("guidance", GUIDANCE[family])
    if guidance <= 1:
        strategy = "one-branch"
    usual = usual_reuse(args.steps, PRESETS[args.preset].share or PRESETS["balanced"].share)
    given_reuse = {"start": args.full_first, "count": args.reused}
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
        height=either("height", SIDE),
        width=either("width", SIDE),
        seed=secrets.randbelow(2**32) if args.seed is None else args.seed,
        sampler=args.sampler or next(iter(SAMPLERS[family])),
        strategy=strategy,
        rule=rule,
        dtype=DTYPES[args.dtype] if args.dtype else usual_dtype(checkpoint, device),
        tiles=args.tiles,
        t5=args.t5,
        reuse=replace(usual, **{key: value for key, value in given_reuse.items() if value is not None}),
    )


def team_size(args: argparse.Namespace, ranks: int, world: int) -> int:
    """How many ranks make one picture together, of `world`; `ranks` is what the strategy is written for."""
    if (args.layout or ("pairs" if args.several else "layers")) == "layers" or world == 1:
        return world
    if world % ranks:
        raise UsageError(f"{world} ranks do not make teams of {ranks}: set --nproc_per_node to a multiple of {ranks}.")
    return ranks


def first_that_can_be_made(args: argparse.Namespace, checkpoint: Checkpoint, device: torch.device, world: int) -> Request:
    """The request of the first picture that can be made; UsageError if there is none (others fail at their turn)."""
    problems = []
    for own in args.told:
        try:
            request = make_request(args, checkpoint, device, own)
            strategy, _ = plan_request(checkpoint, request, world=None)
            args.team_size = team_size(args, strategy.ranks, world)
            plan_request(checkpoint, request, args.team_size)
            return request
        except UsageError as error:
            problems.append(error)
    raise problems[0]


def check_several(args: argparse.Namespace) -> None:
    """UsageError in what cannot be had with several pictures, and where the folder is in use."""
    for name in ("report", "save_latents", "compare_serial", "explain"):
        if getattr(args, name):
            raise UsageError(f"--{name.replace('_', '-')} is for one picture: leave it out, or ask for one prompt.")
    if not 1 <= args.images_per_prompt <= 10**6:
        raise UsageError(f"--images-per-prompt {args.images_per_prompt} is out of range: give 1 to 1000000.")
    args.out = args.out or Path("pictures")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        probe_names = [*args.out.glob("*.png"), *args.out.glob("manifest.jsonl")]
    except OSError as error:
        raise UsageError(f"--out {args.out} cannot be made a folder ({error.strerror}); several pictures go into one.") from None
    check_writable(args.out / "manifest.jsonl", overwrite=True)
    if probe_names and not (args.resume or args.overwrite):
        raise UsageError(f"--out {args.out} holds pictures already: give --resume to go on with them, --overwrite, or another folder.")


def prepare(transport: Transport) -> tuple[argparse.Namespace, Checkpoint, Request | None, torch.device]:
    """Everything that can be refused is refused here, before any long work. No request where only --check is asked for."""
    args = parse_arguments()
    device = choose_device(args.device)
    checkpoint = open_checkpoint(args.weights, args.text_encoders, args.t5_tokenizer)
    if args.no_t5:
        checkpoint.leave_out("t5")
    if args.check:
        return args, checkpoint, None, device
    if checkpoint.family == "sd3" and "t5" not in checkpoint.parts and not args.no_t5:
        checkpoint.remarks = [*checkpoint.remarks, f"The picture is made without T5 ({where_to_get(checkpoint, 't5').rstrip('.')})."]
    if lacking := needs(checkpoint) if not args.decode else []:
        raise UsageError(" ".join(lacking))
    args.told = [{"prompt": prompt} for prompt in args.prompt or ()] + (read_prompts(args.prompts) if args.prompts else [])
    args.several = args.prompts is not None or len(args.told) > 1 or args.images_per_prompt != 1
    args.told = args.told or [{"prompt": checkpoint.defaults.get("prompt", "")}]
    request = first_that_can_be_made(args, checkpoint, device, transport.world)
    if not args.explain and not args.decode:
        refuse_too_large(checkpoint, request, device, transport.world)
    if args.several:
        check_several(args)
    elif transport.rank == 0 and not args.explain:
        args.out = args.out or free_name(Path("picture.png"))
        if args.save_latents and args.save_latents.resolve() == args.out.resolve():
            raise UsageError(f"--save-latents and --out are the same file, {shown(str(args.out))}: give each its own.")
        for path in filter(None, (args.out, args.save_latents)):
            check_writable(path, args.overwrite)
        if args.report:
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
    steps = reuse.window(request.steps) if request.strategy == "guided-pipeline" else reuse.spread(request.steps)
    return f"{request.strategy} ({len(steps)} of {request.steps} steps save work, the first {reuse.start} and the last {reuse.end} never)"


def place_networks(transport: Transport, args: argparse.Namespace, device: torch.device) -> None:
    """Set this process up for its device."""
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    else:
        torch.cuda.set_device(device)
    transport.open_lanes(device, args.transport)


def make_several(transport: Transport, args, checkpoint: Checkpoint, seed: int, device: torch.device) -> int:
    """Make all pictures, each by the team that is free; exit status 1 if one of them failed."""
    if args.resume and args.seed is None and Manifest(args.out).path.exists() and transport.rank == 0:
        seed = Manifest(args.out).read()[0]["seed"]
    seed, size = transport.gather(seed)[0], args.team_size
    jobs = make_jobs(args.told, args.images_per_prompt, seed, args.out)

    def settings(job: Job) -> dict:
        try:
            return settings_of(make_request(args, checkpoint, device, job.own), args.weights, size)
        except UsageError:
            return dict(job.own)  # it will fail at its turn

    manifest, left = begin(jobs, [settings(job) for job in jobs], seed, args.resume, transport)
    if transport.rank == 0:
        say(f"{len(jobs)} pictures, {len(jobs) - len(left)} of them made before, by {transport.world // size} team(s) of {size}: {args.out}/")
    transport.divide(size)
    place_networks(transport, args, device)
    checkpoint.keep = True
    progress = Progress(len(left), transport)

    def on_step(record: StepRecord) -> None:
        if transport.rank == 0:
            transport.add("steps")  # teams that have nothing left to do see that this one lives

    for job in take_turns(left, transport):
        start, problem = time.monotonic(), None
        try:
            request = make_request(args, checkpoint, device, job.own)
            result = generate(checkpoint, request, transport, device, on_step)
            if transport.rank == 0:
                save_picture(result.image, job.path, request.seed, settings_of(request, args.weights, size))
        except UsageError as error:
            problem = str(error)
        problem = next((told for told in transport.gather(problem) if told), None)
        if transport.rank == 0:
            seconds = time.monotonic() - start
            if problem is None:
                manifest.add(line_of(job, "made", seconds=round(seconds, 2), team=transport.team))
                progress.ended(f"{job.path.name}: {seconds:.1f} s, seed {request.seed}, {job.own['prompt']!r:.60}")
            else:
                manifest.add(line_of(job, "failed", why=problem))
                transport.add("failed")
                progress.ended(f"{job.path.name} failed: {problem}")
    failed = transport.add("failed", 0)
    if transport.rank == 0 and transport.team == 0:
        say(f"{len(left) - failed} pictures made, {failed} failed; {manifest.path} lists them")
    return 1 if failed else 0


def sample(transport: Transport, args, checkpoint: Checkpoint, request: Request, device: torch.device) -> None:
    """Make the picture and say what happened."""
    place_networks(transport, args, device)
    speaks = transport.rank == 0
    ranks = f"{transport.world} ranks" if transport.world > 1 else "one process"
    if speaks:
        say(f'{checkpoint.family} from {shown(args.weights)}, {numbers(request)} on {ranks}, {device.type}{transport.route}: "{shown(request.prompt)}"')
        for remark in checkpoint.remarks:
            say(remark)
    bar = tqdm(total=request.steps, desc="warm-up", disable=not speaks, unit="step")
    seen: list[StepRecord] = []

    def on_step(record: StepRecord) -> None:
        if speaks and seen and record.stage != seen[-1].stage:
            why = ""
            if request.strategy == "paper":
                switch = find_switch([earlier.discrepancy for earlier in seen], request.rule)
                why = f" (tau1 = {switch.tau1} by {switch.reason}, tau2 = {switch.tau2})"
            say(f"step {record.step}: {seen[-1].stage} -> {record.stage}{why}")
        seen.append(record)
        bar.set_description(record.stage, refresh=False)
        bar.update()

    result = generate(checkpoint, request, transport, device, on_step)
    bar.close()
    serial = make_serial(transport, checkpoint, request, device) if args.compare_serial else None
    transport.doing = "save"
    if speaks:
        report, latents = make_report(request, result, args.weights, transport.world), result.records[-1].latents
        told = request.seed, settings_of(request, args.weights, transport.world)
        save_both(result.image, latents, args.out, args.save_latents, *told)
        if args.report:
            if serial:
                distance = psnr(result.image, serial.image)
                spent = sum(record.seconds for record in serial.records)
                report["serial"] = {"equal": distance is None, "psnr": distance, "seconds": spent}
            save_report(report, args.report)
            save_page(make_page(report, request, result, serial.image if serial else None), args.report)
        if request.strategy == "paper" and report["tau1"] is None:
            say("the switch never came: every step was condition partitioning")
        say("seconds: " + ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in result.seconds.items()))
        say(f"exact: {report['exact']['words']}")
        say(f"bytes sent: {report['bytes_sent']['total']}")
        say(f"seed: {request.seed}")
        say(f"picture: {args.out}")


def make_serial(transport: Transport, checkpoint: Checkpoint, request: Request, device: torch.device) -> Result | None:
    """The same picture by serial on rank 0, None on the others; they hear of every step, so that they do not give up."""
    if transport.rank:
        for _ in range(request.steps):
            transport.gather("serial")
        return None
    with tqdm(total=request.steps, desc="serial", unit="step") as bar:

        def on_step(record: StepRecord) -> None:
            transport.gather("serial")
            bar.update()

        return generate(checkpoint, replace(request, strategy="serial"), Mailbox(), device, on_step)


def tell(args: argparse.Namespace, checkpoint: Checkpoint, request: Request | None) -> None:
    """What --check and --explain print, what --decode makes: rank 0 alone does it."""
    if args.decode:
        latents, seed, settings = read_latents(args.decode, checkpoint.config("vae").latent_channels)
        save_picture(decode(checkpoint, latents, choose_device(args.device), args.tiles), args.out, seed, settings)
        say(f"picture: {args.out}")
    elif request is None:
        say(describe(checkpoint, t5=not args.no_t5))
    else:
        strategy, _ = plan_request(checkpoint, request, world=1)
        say(explain(request.strategy, strategy, Settings(request.steps, request.rule, request.reuse), meta_task(checkpoint, request)))


def disagreement(transport: Transport, args: argparse.Namespace, checkpoint: Checkpoint, request: Request) -> str | None:
    """A sentence on the first thing in which a rank differs from rank 0 though all must agree; None where nothing does."""
    each_its_own = ("weights", "text_encoders", "t5_tokenizer", "out", "overwrite", "save_latents", "report", "device", "threads", "timeout", "dtype", "prompts", "team_size")
    facts = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in each_its_own}
    facts |= {"the precision": str(request.dtype), "the defaults": repr(replace(request, seed=0)), "the weights": checkpoint.digest()}
    facts |= {"hybridiff": hybridiff.__version__, "torch": torch.__version__, "HYBRIDIFF_TRACE": TRACE}
    ranks = transport.gather(facts)
    for rank, theirs in enumerate(ranks):
        for name, value in ranks[0].items():
            if theirs[name] != value:
                return f"The ranks disagree about {name}: rank 0 has {value!r:.80}, rank {rank} {theirs[name]!r:.80}; start all of them alike."
    return None


def asked_timeout() -> timedelta:
    """--timeout, which is needed before the ranks can talk about any option; a bad value is refused later with the others."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--timeout")
    try:
        seconds = float(early.parse_known_args()[0].timeout or 600)
    except (ValueError, SystemExit, UsageError):
        seconds = 600.0
    return timedelta(seconds=seconds if 0.1 <= seconds <= 1e6 else 600.0)


def main() -> int:
    """Exit status: 0 well, 1 failed on the way (or --check found something missing), 2 refused before any work."""
    transport = Transport()  # until the ranks have met
    try:
        transport = connect(asked_timeout())
        return run(transport)
    except UsageError as error:  # ranks that cannot meet
        say(str(error), error=True)
        return 2
    except (Exception, KeyboardInterrupt) as error:
        if TRACE:
            traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            words = "interrupted" if place()[0] == 0 else None
        else:
            words = str(error) if isinstance(error, PeerLost) else in_a_sentence(error, place()[0], transport.step, transport.doing)
        if words:
            say(words, error=True)
        if transport.world > 1:
            os._exit(1)  # at once: torch.distributed would wait for the others
        return 1


def run(transport: Transport) -> int:
    """The whole of a rank's work; exit status as for `main`."""
    try:
        prepared, problem = prepare(transport), None
    except (UsageError, WeightsError) as error:
        prepared, problem = None, str(error)
    problem = next((said for said in transport.gather(problem) if said), None)  # all ranks stop if one must
    if problem is not None:
        status = 2
        if transport.rank == 0:
            say(problem, error=True)
    elif prepared[0].check or prepared[0].explain or prepared[0].decode:
        args, checkpoint, request, _ = prepared
        status = 1 if args.check and needs(checkpoint) else 0
        if transport.rank == 0:
            try:
                tell(args, checkpoint, request)
            except (UsageError, WeightsError) as error:
                say(str(error), error=True)
                status = 2
        status = transport.gather(status)[0]
    else:
        args, checkpoint, request, device = prepared
        if differs := disagreement(transport, args, checkpoint, request):
            if transport.rank == 0:
                say(differs, error=True)
            transport.leave()
            return 2
        status = 0
        try:
            if args.several:
                status = make_several(transport, args, checkpoint, request.seed, device)
            else:
                request = replace(request, seed=transport.gather(request.seed)[0])
                transport.divide(args.team_size)
                if transport.team == 0:
                    sample(transport, args, checkpoint, request, device)
                transport.until_all_come()
        except (UsageError, WeightsError) as error:  # found on the way, such as a full disk
            if transport.rank == 0 or not isinstance(error, SharedError):
                say(str(error) if isinstance(error, SharedError) else f"rank {transport.rank}: {error}", error=True)
            if transport.world > 1:
                os._exit(1)  # at once: the others see it and end too
            return 1
    transport.leave()  # nobody leaves before rank 0 has spoken
    return status


if __name__ == "__main__":
    prepare_streams()
    end_on_interrupt(speaks=os.environ.get("RANK", "0") == "0")
    sys.exit(main())
