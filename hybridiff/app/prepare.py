"""What is refused before any work: options that do not go together, files in the way, too little memory. It ends in the plans of the pictures."""

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import hybridiff
from hybridiff.app.console import be_quiet, log
from hybridiff.app.files import (
    PICTURE,
    PICTURES,
    check_picture,
    check_writable,
    free_name,
    picture_format,
    read_text,
    this_run,
)
from hybridiff.app.memory import refuse_too_large
from hybridiff.app.options import parse_arguments
from hybridiff.app.prompts import is_comment, read_prompts, text_of_prompts
from hybridiff.app.report.record import settings_of
from hybridiff.distributed.transport import TRACE, Transport
from hybridiff.errors import UsageError, printable
from hybridiff.pipeline import Plan, plan_picture
from hybridiff.request import Request, in_words, make_request
from hybridiff.session import choose_device
from weights.describe import left_out, needs, where_to_get
from weights.load import Checkpoint, WeightsError, open_checkpoint

OF_DECODING = (  # options that go with --decode
    "decode", "weights", "text_encoders", "t5_tokenizer", "no_t5", "device", "threads", "tiles", "timeout", "out",
    "overwrite", "quiet",
)  # fmt: skip
OF_REQUESTS = (  # options that `make_request` takes
    "negative_prompt", "preset", "strategy", "steps", "guidance", "height", "width", "seed", "sampler", "window", "slope",
    "cap", "interval", "full_first", "skipped", "dtype", "tiles", "t5", "balance",
)  # fmt: skip
EACH_ITS_OWN = (  # options in which ranks may differ
    "given", "weights", "text_encoders", "t5_tokenizer", "out", "overwrite", "save_latents", "report", "device", "threads",
    "timeout", "quiet", "dtype", "prompts",
)  # fmt: skip


@dataclass
class Order:
    """What this process has been asked for, checked."""

    args: argparse.Namespace
    checkpoint: Checkpoint
    device: torch.device
    # what each picture says of itself: "prompt" and others of prompts.OWN
    entries: list[dict[str, Any]] = field(default_factory=list)
    comments: int = 0  # lines of the file of prompts
    several: bool = False
    replica_size: int = 1  # ranks that make one picture together
    plan: Plan | None = None  # of the first picture that can be made
    plans: str = ""  # strategies, in words
    found: Path | None = None  # the picture, if an attempt before finished it
    numbered: bool = False  # whether the picture's name is ours to choose

    @property
    def wish(self) -> str:
        """What is asked for: "--check", "--explain", "--decode" or "pictures"."""
        return next(
            (f"--{name}" for name in ("check", "explain", "decode") if getattr(self.args, name)), "pictures"
        )

    def request(self, entry: dict[str, Any]) -> Request:
        """The request of a picture: its own settings, else the options."""
        options = {name: getattr(self.args, name) for name in OF_REQUESTS} | entry
        return make_request(self.checkpoint, device=self.device, **options)


def prepare(transport: Transport) -> Order:
    """Everything that can be refused is refused here, before any long work. Nothing but the checkpoint for --check."""
    device = None
    try:
        args = parse_arguments()
        be_quiet(args.quiet)
        device = choose_device(args.device)
    finally:
        transport.locate(device)  # also where the options are refused: the other ranks wait for it
    checkpoint = open_checkpoint(args.weights, args.text_encoders, args.t5_tokenizer)
    if args.no_t5:
        checkpoint.leave_out("t5")
    order = Order(args, checkpoint, device)
    if not args.check:
        check_options(order)
        read_entries(order, transport)
        plan_all(order, transport)
        check_files(order, transport)
    return order


def check_options(order: Order) -> None:
    """UsageError in options that do not go together, and where the checkpoint lacks something."""
    args, checkpoint = order.args, order.checkpoint
    if args.decode and (others := [name for name in args.given if name not in OF_DECODING]):
        raise UsageError(
            f"--{others[0].replace('_', '-')} has no effect with --decode, which only decodes a picture: leave one of them out."
        )
    if args.compare_serial and not args.report:
        raise UsageError("--compare-serial goes into the report: give --report DIR too.")
    if not 0.1 <= args.timeout <= 1e6:
        raise UsageError(f"--timeout {args.timeout} is out of range: give seconds, 0.1 to 1e6.")
    if args.threads < 1:
        raise UsageError(f"--threads {args.threads} is out of range: give at least 1.")
    for part in left_out(checkpoint) if not args.no_t5 else ():
        why = where_to_get(checkpoint, part).rstrip(".")
        checkpoint.remarks = [*checkpoint.remarks, f"The picture is made without {part.upper()} ({why})."]
    if lacking := needs(checkpoint) if not args.decode else []:
        raise UsageError(" ".join(lacking))


def read_entries(order: Order, transport: Transport) -> None:
    """The pictures that are asked for."""
    args = order.args
    text = text_of_prompts(args.prompts, transport.world) if args.prompts else ""
    order.entries = [{"prompt": prompt} for prompt in args.prompt or ()]
    order.entries += read_prompts(args.prompts, text) if args.prompts else []
    order.comments = sum(map(is_comment, text.split("\n")))
    order.several = args.prompts is not None or len(order.entries) > 1 or args.images_per_prompt != 1
    order.entries = order.entries or [{"prompt": order.checkpoint.defaults.get("prompt", "")}]
    if args.resume and not order.several:
        raise UsageError(
            "--resume goes on with several pictures, and one is asked for: leave it out, or ask for more."
        )


def plan_all(order: Order, transport: Transport) -> None:
    """Plan the pictures; UsageError where none of them can be made (else the others fail at their turn), or they need too much memory."""
    args, requests, problems, plans = order.args, [], [], []
    for entry in order.entries:
        try:
            request = order.request(entry)
            requests.append((request, plan_picture(order.checkpoint, request, None).strategy.ranks))
        except UsageError as error:
            problems.append(error)
    if requests:
        order.replica_size = replica_size(order, max(ranks for _, ranks in requests), transport.world)
    for request, _ in requests:
        try:
            plans.append(plan_picture(order.checkpoint, request, order.replica_size))
        except UsageError as error:
            problems.append(error)
    if not plans:
        raise problems[0]
    order.plan, order.plans = plans[0], " or ".join(dict.fromkeys(in_words(plan.request) for plan in plans))
    if order.wish != "pictures":
        return
    if args.transport == "nccl" and (problem := transport.nccl_problem(order.replica_size)):
        raise UsageError(f"--transport nccl: {problem}; leave it out, or give --transport gloo.")
    largest = max((plan.request for plan in plans), key=lambda request: request.height * request.width)
    ranks, sharing = transport.neighbours()
    refuse_too_large(
        order.checkpoint, largest, order.device, ranks, order.replica_size, order.several, sharing
    )


def replica_size(order: Order, ranks: int, world: int) -> int:
    """How many ranks make one picture together, of `world`; `ranks` is what the strategy is written for."""
    if (order.args.layout or ("pairs" if order.several else "layers")) == "layers" or world == 1:
        return world
    if world % ranks:
        raise UsageError(
            f"{world} ranks do not make replicas of {ranks}: set --nproc_per_node to a multiple of {ranks}."
        )
    return ranks


def check_files(order: Order, transport: Transport) -> None:
    """UsageError where something is in the way of what is to be written. Chooses the names that are not given."""
    args = order.args
    order.numbered = args.out is None and not args.overwrite
    if order.several:
        check_several(args)
    elif transport.rank == 0 and not args.explain:
        order.found = finished_before(args)
        if order.found:
            return
        args.out = args.out or (PICTURE if args.overwrite else free_name(PICTURE))
        if args.save_latents and args.save_latents.resolve() == args.out.resolve():
            raise UsageError(
                f"--save-latents and --out are the same file, {printable(str(args.out))}: give each its own."
            )
        if args.decode:
            picture_format(args.out)
        else:
            request = order.plan.request
            check_picture(args.out, request.seed, settings_of(request, args.weights, transport.world))
        for path in filter(None, (args.out, args.save_latents)):
            check_writable(path, args.overwrite)
        if args.report:
            check_report(args)


def check_report(args: argparse.Namespace) -> None:
    """UsageError where the report cannot be written."""
    if args.report.suffix.lower() in (".html", ".json") and not args.report.is_dir():
        raise UsageError(
            f"--report {printable(str(args.report))} is the name of a file, and the report goes into a folder: give the name of a folder."
        )
    try:
        args.report.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--report {args.report} cannot be made ({error.strerror}).") from None
    for name in ("report.json", "report.html"):
        check_writable(args.report / name, args.overwrite)


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
            f"--out {printable(str(args.out))} is the name of one picture, and several go into a folder: give the name of a folder."
        )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--out {args.out} cannot be made a folder ({error.strerror}); several pictures go into one."
        ) from None
    check_writable(args.out / "manifest.jsonl", overwrite=True)


def finished_before(args: argparse.Namespace) -> Path | None:
    """The picture, if an attempt of this run that torchrun has restarted since made it; a report that it did not come to write is named."""
    run = this_run()
    candidates = [args.out] if args.out else sorted(Path().glob(f"{PICTURE.stem}*{PICTURE.suffix}"))
    found = next((path for path in candidates if run and read_text(path).get("run") == run), None)
    if found is None:
        return None
    reports = [args.report / name for name in ("report.json", "report.html")] if args.report else []
    for path in reports:  # written after the picture, as the latents are not
        if not path.exists() or path.stat().st_mtime < found.stat().st_mtime:
            again = f"--seed {read_text(found)['seed']} --out {found} --overwrite"
            log(
                f"{found} was made before this run was restarted, but not {path}: for a report make it again with {again}"
            )
            break
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


def disagreement(transport: Transport, order: Order) -> str | None:
    """A sentence on the first thing in which a rank differs from rank 0 though all must agree; None where nothing does."""
    if transport.world == 1:
        return None
    request = order.plan.request
    facts = {"hybridiff": hybridiff.__version__, "torch": torch.__version__, "HYBRIDIFF_TRACE": TRACE}
    facts |= {
        f"--{name.replace('_', '-')}": value
        for name, value in vars(order.args).items()
        if name not in EACH_ITS_OWN
    }
    facts |= {"the precision": str(request.dtype), "the prompts": order.entries}
    facts["the defaults"] = [request.guidance, request.height, request.width, request.sampler, request.t5]
    try:
        facts["the weights"] = order.checkpoint.digest()
    except WeightsError as error:
        facts["the weights"] = str(error)
    ranks = transport.all_gather({name: repr(value) for name, value in facts.items()})
    for rank, theirs in enumerate(ranks):
        for name, value in ranks[0].items():
            if theirs.get(name) != value:
                return f"The ranks disagree about {name}: rank 0 has {value:.80}, rank {rank} {theirs.get(name)!s:.80}; start all of them alike."
    return None
