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
from dataclasses import replace

import torch
from tqdm import tqdm

import hybridiff
from hybridiff.batch import Job, Manifest, Progress, begin, line_of, make_jobs, take_turns
from hybridiff.denoise import StepRecord
from hybridiff.ending import (
    by_interrupt,
    end_of_work,
    end_on_interrupt,
    in_a_sentence,
    prepare_streams,
    say,
    shown,
)
from hybridiff.errors import SharedError, UsageError
from hybridiff.latents import read_latents, save_both
from hybridiff.options import asked_timeout, choose_device, make_request, numbers, prepare
from hybridiff.page import make_page, psnr, save_page
from hybridiff.pipeline import Request, Result, agree, decode, generate, meta_task, plan_request
from hybridiff.report import in_use, make_report, save_picture, save_report, settings_of
from hybridiff.strategies import Settings
from hybridiff.switching import find_switch
from hybridiff.timeline import explain
from hybridiff.transport import TRACE, Mailbox, PeerLost, Transport, connect, place
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


def make_several(transport: Transport, args, checkpoint: Checkpoint, device: torch.device) -> int:
    """Make all pictures, each by the team that is free; exit status 1 if one of them failed."""
    seed, problem, size = args.seed, None, args.team_size
    if transport.rank == 0 and seed is None:
        try:
            seed = (
                Manifest(args.out).read()[0]["seed"]
                if args.resume and Manifest(args.out).path.exists()
                else secrets.randbelow(2**32)
            )
        except UsageError as error:
            problem = str(error)
    agree(transport, problem)
    seed = transport.gather(seed)[0]
    jobs = make_jobs(args.told, args.images_per_prompt, seed, args.out)

    def settings(job: Job) -> dict:
        try:
            return settings_of(make_request(args, checkpoint, device, job.own), args.weights, size)
        except UsageError:
            return dict(job.own)  # it will fail at its turn

    manifest, left = begin(
        jobs, [settings(job) for job in jobs], seed, args.resume, args.overwrite, transport
    )
    if transport.rank == 0:
        say(
            f"{len(jobs)} pictures, {len(jobs) - len(left)} of them made before, by {transport.world // size} team(s) of {size}: {args.out}/"
        )
    transport.divide(size)
    set_up(transport, args, device)
    if transport.rank == 0 and transport.team == 0:
        introduce(transport, args, checkpoint, device, args.plans)
    checkpoint.keep = True
    progress = Progress(len(left), transport)

    def on_step(record: StepRecord) -> None:
        transport.step_done()

    for job in take_turns(left, transport):
        start, problem = time.monotonic(), None
        try:
            request = make_request(args, checkpoint, device, job.own)
            result = generate(checkpoint, request, transport, device, on_step)
            if transport.rank == 0:
                save_picture(result.image, job.path, request.seed, settings_of(request, args.weights, size))
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
            if problem is None:
                manifest.add(line_of(job, "made", seconds=round(seconds, 2), team=transport.team))
                progress.ended(
                    f"{job.path.name}: {seconds:.1f} s, seed {request.seed}, {job.own['prompt']!r:.60}"
                )
            else:
                manifest.add(line_of(job, "failed", why=problem))
                transport.add("failed")
                progress.ended(f"{job.path.name} failed: {problem}")
    failed = transport.add("failed", 0)
    if transport.rank == 0 and transport.team == 0:
        say(f"{len(left) - failed} pictures made, {failed} failed; {manifest.path} lists them")
    return 1 if failed else 0


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
        transport.step_done()
        bar.set_description(record.stage, refresh=False)
        bar.update()

    result = generate(checkpoint, request, transport, device, on_step)
    bar.close()
    transport.doing = "save"
    if speaks:
        told = request.seed, settings_of(request, args.weights, transport.world)
        save_both(result.image, result.records[-1].latents, args.out, args.save_latents, *told)
    serial = make_serial(transport, checkpoint, request, device) if args.compare_serial else None
    transport.doing = "save"
    if speaks:
        report = make_report(request, result, args.weights, transport.world)
        if args.report:
            if serial:
                distance = psnr(result.image, serial.image)
                spent = sum(record.seconds for record in serial.records)
                report["serial"] = {"equal": distance is None, "psnr": distance, "seconds": spent}
            save_report(report, args.report)
            save_page(make_page(report, request, result, serial.image if serial else None), args.report)
        if request.strategy == "paper" and report["tau1"] is None:
            say("the switch never came: every step was condition partitioning")
        for line in in_use(result.use):
            say(line)
        say(
            f"seconds{' of the slowest rank' if transport.world > 1 else ''}: "
            + ", ".join(f"{phase} {max(seconds):.2f}" for phase, seconds in result.seconds.items())
        )
        say(f"exact: {report['exact']['words']}")
        say(f"bytes sent: {report['bytes_sent']['total']}")
        say(f"seed: {request.seed}")
        say(f"picture: {args.out}")


def make_serial(
    transport: Transport, checkpoint: Checkpoint, request: Request, device: torch.device
) -> Result | None:
    """The same picture by serial on rank 0, None on the others; they hear of every step, so that they do not give up."""
    if transport.rank:
        for _ in range(request.steps):
            transport.gather("serial")
        return None
    with tqdm(total=request.steps, desc="serial", unit="step") as bar:

        def on_step(record: StepRecord) -> None:
            transport.gather("serial")
            transport.step_done()
            bar.update()

        return generate(
            checkpoint, replace(request, strategy="serial", balance=False), Mailbox(), device, on_step
        )


def tell(args: argparse.Namespace, checkpoint: Checkpoint, request: Request | None) -> None:
    """What --check and --explain print, what --decode makes: rank 0 alone does it."""
    if args.decode:
        latents, seed, settings = read_latents(args.decode, checkpoint.config("vae").latent_channels)
        torch.set_num_threads(args.threads)
        save_picture(
            decode(checkpoint, latents, choose_device(args.device), args.tiles), args.out, seed, settings
        )
        say(f"picture: {args.out}")
    elif request is None:
        say(describe(checkpoint, t5=not args.no_t5))
    else:
        strategy, _ = plan_request(checkpoint, request, args.team_size)
        settings = Settings(request.steps, request.rule, request.reuse)
        say(explain(request.strategy, strategy, settings, meta_task(checkpoint, request, args.team_size)))


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
        "device",
        "threads",
        "timeout",
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
        if os.environ.get("WORLD_SIZE", "1") != "1":  # also where the ranks have not met
            os._exit(1)  # at once: torch.distributed would wait for the others
        return 1


def run(transport: Transport) -> int:
    """The whole of a rank's work; exit status as for `main`."""
    try:
        prepared, problem = prepare(transport), None
    except (UsageError, WeightsError) as error:
        prepared, problem = None, str(error)
    asked = next(
        (f"--{name}" for name in ("check", "explain", "decode") if prepared and getattr(prepared[0], name)),
        "pictures",
    )
    problems, wishes = zip(*transport.gather((problem, asked)))
    problem = next((said for said in problems if said), None)  # all ranks stop if one must
    if problem is None and (
        other := next((rank for rank, wish in enumerate(wishes) if wish != wishes[0]), None)
    ):
        problem = f"The ranks disagree about what to do: rank 0 is asked for {wishes[0]}, rank {other} for {wishes[other]}; start all of them alike."
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
                status = make_several(transport, args, checkpoint, device)
            else:
                request = replace(request, seed=transport.gather(request.seed)[0])
                transport.divide(args.team_size)
                if transport.team == 0:
                    sample(transport, args, checkpoint, request, device)
                transport.until_all_come()
        except (UsageError, WeightsError) as error:  # found on the way, such as a full disk
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
