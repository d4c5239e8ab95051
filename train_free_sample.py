"""Make a picture with one process or with torchrun on two ranks or more.

torchrun --nproc_per_node=2 train_free_sample.py                       # the SDXL demo, preset `balanced`
torchrun --nproc_per_node=2 train_free_sample.py --weights demo-sd3    # the SD3 demo
python train_free_sample.py                                            # the same schedule in one process
torchrun --nproc_per_node=2 train_free_sample.py --weights sd_xl_base_1.0.safetensors --prompt "a red fox"
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while the packages are being imported ends without a traceback
    WORD = b"train_free_sample.py: interrupted\n" if os.environ.get("RANK", "0") == "0" else b""
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, WORD), os._exit(1)))

import argparse
import secrets
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace

import torch

import hybridiff
from hybridiff.batch import (
    Job,
    Manifest,
    Progress,
    already_made,
    begin,
    line_of,
    make_jobs,
    read_prompts,
    take_turns,
)
from hybridiff.denoise import StepRecord
from hybridiff.ending import (
    StepBar,
    be_quiet,
    by_interrupt,
    end_of_work,
    end_on_interrupt,
    in_a_sentence,
    prepare_streams,
    record_failure,
    say,
    shown,
)
from hybridiff.errors import SharedError, UsageError
from hybridiff.latents import read_latents, rescue, save_both
from hybridiff.options import (
    asked_timeout,
    check_text,
    choose_device,
    make_request,
    numbers,
    prepare,
    started_without_torchrun,
)
from hybridiff.page import against_serial, make_page, psnr, save_page
from hybridiff.pipeline import Request, Result, agree, decode, generate, meta_task, plan_request
from hybridiff.report import in_use, make_report, save_picture, save_report, settings_of, this_run
from hybridiff.strategies import Settings
from hybridiff.switching import find_switch
from hybridiff.text import cuts
from hybridiff.timeline import explain
from hybridiff.transport import TRACE, Mailbox, PeerLost, Transport, connect, place
from weights.demo.words import remarks_on
from weights.describe import describe, needs
from weights.load import Checkpoint, WeightsError


def set_up(transport: Transport, args: argparse.Namespace, device: torch.device) -> None:
    """Ready this process for its device, and connect it to its team."""
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    else:
        torch.cuda.set_device(device)
    transport.open_lanes(device, args.transport)


def introduce(
    transport: Transport,
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    device: torch.device,
    plan: str,
    prompt: str = "",
) -> None:
    """Say with what the pictures are made, and what was noticed while loading."""
    say(f"{checkpoint.family} from {shown(args.weights)}, {plan}, {device.type}{transport.route}{prompt}")
    for remark in checkpoint.remarks:
        say(remark)
    texts = (
        own.get(name, getattr(args, name)) for own in args.told for name in ("prompt", "negative_prompt")
    )
    for remark in remarks_on(texts, checkpoint.defaults.get("prompt")):
        say(remark)


def say_cuts(checkpoint: Checkpoint, texts: Iterable[tuple[str, str, str | None]]) -> None:
    """Say what the text encoders leave out. `texts`: a name (may be empty), the prompt and the negative prompt; equal cuts share a line."""
    named: dict[str, list[str]] = {}
    for name, prompt, negative_prompt in texts:
        for sentence in cuts(checkpoint, prompt, negative_prompt):
            named.setdefault(sentence, []).append(name)
    for sentence, (first, *others) in named.items():
        names = ", ".join([first, *others[:2]]) + (f" and {len(others) - 2} more" if others[2:] else "")
        say(f"{names}: {sentence}" if names else sentence)


def begin_several(
    transport: Transport, args, checkpoint: Checkpoint, device: torch.device
) -> tuple[Manifest, list[Job], list[Job]]:
    """(manifest, all pictures, those that are still to be made). Sets args.run. SharedError where the folder holds what must stay, before any work.

    Where torchrun has restarted the ranks, the pictures of the attempt before are kept and it goes on with its seed; its manifest tells its run.
    """
    args.run, again, seed, weights, problem = transport.gather(this_run())[0], False, args.seed, None, None
    if transport.rank == 0:
        manifest = Manifest(args.out)
        again = args.run is not None and manifest.run() == args.run
        try:
            weights = checkpoint.digest()
            if seed is None and (args.resume or again) and manifest.path.exists():
                seed = manifest.read()[0]["seed"]
        except (UsageError, WeightsError) as error:
            problem = str(error)
    agree(transport, problem)
    drawn = secrets.randbelow(2**32) if seed is None else seed
    head = {"seed": drawn, "weights": weights, "run": args.run or secrets.token_hex(8)}
    again, head = transport.gather((again, head))[0]
    jobs = make_jobs(args.told, args.images_per_prompt, head["seed"], args.out)
    only = args.run if again and args.overwrite and not args.resume else None
    manifest, left = begin(
        jobs,
        [settings_of_job(args, checkpoint, device, job) for job in jobs],
        head,
        args.resume or again,
        args.overwrite,
        only,
        transport,
    )
    return manifest, jobs, left


def settings_of_job(args, checkpoint: Checkpoint, device: torch.device, job: Job) -> dict:
    """The settings of a picture, as its file has them."""
    try:
        request = make_request(args, checkpoint, device, job.own)
        return settings_of(request, args.weights, args.team_size)
    except UsageError:
        return dict(job.own)  # it will fail at its turn


def texts_of(
    args, checkpoint: Checkpoint, device: torch.device, jobs: Iterable[Job]
) -> Iterator[tuple[str, str, str | None]]:
    """The texts of pictures, as for `say_cuts`; those that cannot be made will fail at their turn."""
    for job in jobs:
        with suppress(UsageError):
            request = make_request(args, checkpoint, device, job.own)
            yield job.path.name, request.prompt, request.negative_prompt


def make_several(
    transport: Transport,
    args,
    checkpoint: Checkpoint,
    device: torch.device,
    manifest: Manifest,
    jobs: list[Job],
    left: list[Job],
) -> int:
    """Make the pictures that are `left` of all `jobs`, each by the team that is free; exit status 1 unless every one is there in the end."""
    size = args.team_size
    if transport.rank == 0:
        say(
            f"{len(jobs)} pictures, {len(jobs) - len(left)} of them made before, by {transport.world // size} team(s) of {size}: {args.out}/"
        )
        if args.comments:
            say(f'{args.comments} line(s) of {args.prompts} are comments, as they begin with "# "')
    transport.divide(size)
    set_up(transport, args, device)
    if transport.rank == 0 and transport.team == 0:
        introduce(transport, args, checkpoint, device, args.plans)
        say_cuts(checkpoint, texts_of(args, checkpoint, device, left))
    checkpoint.keep = True
    progress = Progress(len(left), transport)

    def on_step(record: StepRecord) -> None:
        transport.step_done()

    for job in take_turns(left, transport):
        start, problem, outcome = time.monotonic(), None, "made"
        try:
            request = make_request(args, checkpoint, device, job.own)
            result = generate(checkpoint, request, transport, device, on_step)
            if transport.rank == 0:
                told = request.seed, settings_of(request, args.weights, size)
                outcome = save_job(result, job, told, args.overwrite, args.run)
        except UsageError as error:
            problem = str(error)
        except PeerLost:
            raise
        except (
            Exception
        ) as error:  # such as too little memory: the other ranks of the team cannot go on alone
            problem = in_a_sentence(error, place()[0], transport.step, transport.doing)
            if transport.world > 1:
                manifest.add(line_of(job, "failed", why=problem))  # --resume makes it last
                raise
            transport.forget()
            if TRACE:
                traceback.print_exc()
        problem = next((told for told in transport.gather(problem) if told), None)
        if transport.rank == 0:
            seconds = time.monotonic() - start
            outcome = outcome if problem is None else "failed"
            transport.add(outcome)
            if outcome == "made":
                progress.ended(
                    f"{job.path.name}: {seconds:.1f} s, seed {request.seed}, {job.own['prompt']!r:.60}"
                )
                manifest.add(line_of(job, "made", seconds=round(seconds, 2), team=transport.team))
            elif outcome == "failed":
                if args.quiet:
                    say(f"{job.path.name} failed: {problem}", error=True)
                progress.ended(f"{job.path.name} failed: {problem}")
                manifest.add(line_of(job, "failed", why=problem))
            else:
                progress.ended(f"{job.path.name} was made by another run meanwhile")
    made, failed, found = (transport.add(outcome, 0) for outcome in ("made", "failed", "found"))
    found += len(jobs) - len(left)
    if transport.rank == 0 and transport.team == 0:
        say(f"{made} pictures made, {failed} failed, {found} found; {manifest.path} lists them")
        if made + failed + found != len(jobs):
            say(f"{len(jobs)} pictures were asked for: give --resume to make those that lack.", error=True)
        if args.quiet:
            say(str(manifest.path), result=True)
    if failed:
        record_failure(f"{failed} pictures failed; {manifest.path} says why.")
    return 0 if failed == 0 and made + found == len(jobs) else 1


def save_job(result: Result, job: Job, told: tuple[int, dict], overwrite: bool, run: str | None) -> str:
    """Write a picture of a batch: "made", or "found" where another run of the same batch has just made it. UsageError where that fails; its latents are kept."""
    try:
        save_picture(result.image, job.path, *told, overwrite, run=run)
        return "made"
    except UsageError as error:
        if already_made(job, told[1]):
            return "found"
        said = rescue(result.records[-1].latents, None, *told)[1]
        raise UsageError(f"{error} {said}") from None


def sample(
    transport: Transport, args, checkpoint: Checkpoint, request: Request, device: torch.device
) -> None:
    """Make the picture and say what happened."""
    set_up(transport, args, device)
    speaks = transport.rank == 0
    ranks = f"{transport.world} ranks" if transport.world > 1 else "one process"
    if speaks:
        introduce(
            transport,
            args,
            checkpoint,
            device,
            f"{numbers(request)} on {ranks}",
            f': "{shown(request.prompt)}"',
        )
        say_cuts(checkpoint, [("", request.prompt, request.negative_prompt)])
    bar = StepBar(request.steps, "warm-up", speaks, TRACE)
    seen: list[StepRecord] = []

    def on_step(record: StepRecord) -> None:
        if speaks and seen and record.stage != seen[-1].stage:
            why = ""
            if request.strategy == "paper":
                switch = find_switch([earlier.discrepancy for earlier in seen], request.rule)
                why = f" (tau1 = {switch.tau1} by {switch.reason}, tau2 = {switch.tau2})"
            say(f"step {record.step}: {seen[-1].stage} -> {record.stage}{why}")
        seen.append(record)
        transport.step_done()
        bar.step(record.stage)

    result = generate(checkpoint, request, transport, device, on_step)
    bar.close()
    transport.doing = "save"
    if speaks:
        told = request.seed, settings_of(request, args.weights, transport.world), args.overwrite
        images = result.image, result.records[-1].latents
        wished, names = args.out, (args.out, args.save_latents)
        args.out = save_both(*images, *names, *told, numbered=args.numbered, run=this_run())
        if args.out != wished:
            say(f"{wished} was made by another run meanwhile: this picture is {args.out}")
    serial = make_serial(transport, checkpoint, request, device) if args.compare_serial else None
    transport.doing = "save"
    if speaks:
        report = make_report(request, result, args.weights, transport.world)
        if args.report:
            if serial:
                distance = psnr(result.image, serial.image)
                spent = sum(record.seconds for record in serial.records)
                report["serial"] = {"equal": distance is None, "psnr": distance, "seconds": spent}
            page = make_page(report, request, result, serial.image if serial else None)
            try:
                save_report(report, args.report, args.overwrite)
                save_page(page, args.report, args.overwrite)
            except UsageError as error:
                raise UsageError(f"{error} The picture is in {args.out}.") from None
            if serial:
                say(against_serial(report))
        if request.strategy == "paper" and report["tau1"] is None:
            say("the switch never came: every step was condition partitioning")
        for line in in_use(result.use):
            say(line)
        say(
            f"seconds{' of the slowest rank' if transport.world > 1 else ''}: "
            + ", ".join(f"{phase} {max(seconds):.2f}" for phase, seconds in result.seconds.items())
        )
        say(f"exact: {report['exact']['words']}")
        if transport.world > 1:
            say(f"bytes sent: {report['bytes_sent']['total']}")
        say(f"seed: {request.seed}")
        if args.report:
            say(f"report: {args.report / 'report.html'}")
        say(str(args.out) if args.quiet else f"picture: {args.out}", result=True)


def make_serial(
    transport: Transport, checkpoint: Checkpoint, request: Request, device: torch.device
) -> Result | None:
    """The same picture by serial on rank 0, None on the others; they hear of every step, so that they do not give up."""
    if transport.rank:
        for _ in range(request.steps):
            transport.gather("serial")
        return None
    bar = StepBar(request.steps, "serial", True, TRACE)

    def on_step(record: StepRecord) -> None:
        transport.gather("serial")
        transport.step_done()
        bar.step("serial")

    alone = replace(request, strategy="serial", balance=False)
    result = generate(checkpoint, alone, Mailbox(), device, on_step)
    bar.close()
    return result


def texts_to_check(args: argparse.Namespace) -> Iterator[tuple[str, str, str | None]]:
    """The prompts that --check is given, as for `say_cuts`."""
    told = [{"prompt": prompt} for prompt in args.prompt or ()]
    told += read_prompts(args.prompts) if args.prompts else []
    for number, own in enumerate(told or [{"prompt": ""}], 1):
        texts = own["prompt"], own.get("negative_prompt", args.negative_prompt)
        for name, text in zip(("--prompt", "--negative-prompt"), texts):
            check_text(name, text)
        yield f"prompt {number}" if len(told) > 1 else "", *texts


def tell(args: argparse.Namespace, checkpoint: Checkpoint, request: Request | None) -> None:
    """What --check and --explain print, what --decode makes: rank 0 alone does it."""
    if args.decode:
        latents, seed, settings = read_latents(args.decode, checkpoint.config("vae").latent_channels)
        torch.set_num_threads(args.threads)
        image = decode(checkpoint, latents, choose_device(args.device), args.tiles)
        how = args.overwrite, args.numbered, this_run()
        path = save_picture(image, args.out, seed, settings, *how)
        say(str(path) if args.quiet else f"picture: {path}", result=True)
    elif request is None:
        say(describe(checkpoint, t5=not args.no_t5), result=True)
        if not needs(checkpoint):
            say_cuts(checkpoint, texts_to_check(args))
    else:
        strategy, _ = plan_request(checkpoint, request, args.team_size)
        settings = Settings(request.steps, request.rule, request.reuse)
        task = meta_task(checkpoint, request, args.team_size)
        say(explain(request.strategy, strategy, settings, task), result=True)
        say_cuts(checkpoint, [("", request.prompt, request.negative_prompt)])


def disagreement(
    transport: Transport, args: argparse.Namespace, checkpoint: Checkpoint, request: Request
) -> str | None:
    """A sentence on the first thing in which a rank differs from rank 0 though all must agree; None where nothing does."""
    if transport.world == 1:
        return None
    each_its_own = (
        "told",
        "given",
        "weights",
        "text_encoders",
        "t5_tokenizer",
        "out",
        "overwrite",
        "save_latents",
        "report",
        "found",
        "numbered",
        "device",
        "threads",
        "timeout",
        "quiet",
        "dtype",
        "prompts",
        "team_size",
        "plans",
    )
    facts = {"hybridiff": hybridiff.__version__, "torch": torch.__version__, "HYBRIDIFF_TRACE": TRACE}
    facts |= {
        f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in each_its_own
    }
    facts |= {
        "the precision": str(request.dtype),
        "the defaults": repr(replace(request, seed=0)),
        "the prompts": args.told,
    }
    try:
        facts["the weights"] = checkpoint.digest()
    except WeightsError as error:
        facts["the weights"] = str(error)
    ranks = transport.gather({name: repr(value) for name, value in facts.items()})
    for rank, theirs in enumerate(ranks):
        for name, value in ranks[0].items():
            if theirs.get(name) != value:
                return f"The ranks disagree about {name}: rank 0 has {value:.80}, rank {rank} {theirs.get(name)!s:.80}; start all of them alike."
    return None


def main() -> int:
    """Exit status: 0 well, 1 failed on the way (or --check found something missing), 2 refused before any work."""
    transport = Transport()  # until the ranks have met
    if problem := started_without_torchrun():
        if {os.environ.get(name, "0") for name in ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")} == {
            "0"
        }:
            say(problem, error=True)  # one task speaks
        return 2
    try:
        transport = connect(asked_timeout())
        return run(transport)
    except UsageError as error:  # ranks that cannot meet
        say(str(error), error=True)
        return 2
    except (Exception, KeyboardInterrupt) as error:
        interrupted = by_interrupt(error, lost=isinstance(error, PeerLost))
        if TRACE:
            traceback.print_exc()
        if interrupted:
            words = "interrupted" if place()[0] == 0 else None
        else:
            words = (
                str(error)
                if isinstance(error, PeerLost)
                else in_a_sentence(error, place()[0], transport.step, transport.doing)
            )
        if words:
            say(words, error=True)
        if isinstance(error, PeerLost):
            record_failure(str(error), later=2)
        if os.environ.get("WORLD_SIZE", "1") != "1":  # also where the ranks have not met
            os._exit(1)  # at once: torch.distributed would wait for the others
        return 1


def run(transport: Transport) -> int:
    """The whole of a rank's work; exit status as for `main`."""
    try:
        prepared, problem = prepare(transport), None
        be_quiet(prepared[0].quiet)
    except (UsageError, WeightsError) as error:
        prepared, problem = None, str(error)
    asked = next(
        (f"--{name}" for name in ("check", "explain", "decode") if prepared and getattr(prepared[0], name)),
        "pictures",
    )
    found = prepared[0].found if prepared and asked in ("pictures", "--decode") else None
    problems, wishes, finds = zip(*transport.gather((problem, asked, found and str(found))))
    problem = next((said for said in problems if said), None)  # all ranks stop if one must
    if problem is None and (
        other := next((rank for rank, wish in enumerate(wishes) if wish != wishes[0]), None)
    ):
        problem = f"The ranks disagree about what to do: rank 0 is asked for {wishes[0]}, rank {other} for {wishes[other]}; start all of them alike."
    if problem is not None:
        status = 2
        record_failure(problem)
        if transport.rank == 0:
            say(problem, error=True)
    elif finds[0]:
        status = 0
        if transport.rank == 0:
            say("the picture was finished before this run was restarted")
            quiet = prepared[0].quiet
            say(finds[0] if quiet else f"picture: {finds[0]}", result=True)
    elif prepared[0].check or prepared[0].explain or prepared[0].decode:
        args, checkpoint, request, _ = prepared
        status, problem = (
            (1, " ".join(lacking)) if args.check and (lacking := needs(checkpoint)) else (0, None)
        )
        if transport.rank == 0:
            try:
                tell(args, checkpoint, request)
            except (UsageError, WeightsError) as error:
                say(str(error), error=True)
                status, problem = 2, str(error)
        status, problem = transport.gather((status, problem))[0]
        if problem:
            record_failure(problem)
    else:
        args, checkpoint, request, device = prepared
        problem, batch = disagreement(transport, args, checkpoint, request), None
        try:
            if args.several and problem is None:
                batch = begin_several(transport, args, checkpoint, device)
        except SharedError as error:
            problem = str(error)
        if problem:
            record_failure(problem)
            if transport.rank == 0:
                say(problem, error=True)
            transport.leave()
            return 2
        status = 0
        try:
            if args.several:
                status = make_several(transport, args, checkpoint, device, *batch)
            else:
                request = replace(request, seed=transport.gather(request.seed)[0])
                transport.divide(args.team_size)
                if transport.team == 0:
                    sample(transport, args, checkpoint, request, device)
                transport.until_all_come()
        except (UsageError, WeightsError) as error:  # found on the way, such as a full disk
            record_failure(str(error))
            if transport.rank == 0 or not isinstance(error, SharedError):
                prefix = "" if isinstance(error, SharedError) or place()[1] == 1 else f"rank {place()[0]}: "
                say(f"{prefix}{error}", error=True)
            if transport.world > 1:
                if isinstance(error, SharedError):
                    transport.end_together()
                os._exit(1)  # at once: the others see it and end too
            return 1
    transport.leave()  # nobody leaves before rank 0 has spoken
    return status


if __name__ == "__main__":
    prepare_streams()
    end_on_interrupt(speaks=os.environ.get("RANK", "0") == "0")
    status = main()
    end_of_work()
    sys.exit(status)
