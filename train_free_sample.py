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

import sys
import traceback
from dataclasses import replace

import torch

from hybridiff.app.console import (
    StepBar,
    by_interrupt,
    end_of_work,
    end_on_interrupt,
    finish_despite_interrupts,
    in_a_sentence,
    log,
    prepare_streams,
    record_failure,
)
from hybridiff.app.explain import explain
from hybridiff.app.files import save_picture, this_run
from hybridiff.app.introduce import introduce, log_cuts, set_up, texts_to_check
from hybridiff.app.latents import read_latents, save_both
from hybridiff.app.options import asked_timeout
from hybridiff.app.prepare import Order, disagreement, prepare, started_without_torchrun
from hybridiff.app.profile import Profile
from hybridiff.app.report.page import against_serial, make_page, psnr, save_page
from hybridiff.app.report.record import in_use, make_report, save_report, settings_of
from hybridiff.app.several import begin_several, make_several
from hybridiff.denoise import StepRecord
from hybridiff.distributed.transport import TRACE, LocalTransport, Transport, connect, place
from hybridiff.errors import PeerLost, SharedError, UsageError, printable
from hybridiff.pipeline import Plan, Result, decode, generate, meta_task, plan_picture
from hybridiff.request import in_words
from hybridiff.session import choose_device
from weights.describe import describe, needs
from weights.load import WeightsError


def make_picture(transport: Transport, order: Order) -> None:
    """Make one picture and say what happened."""
    args, checkpoint, plan = order.args, order.checkpoint, order.plan
    set_up(transport, order)
    speaks = transport.rank == 0
    if speaks:
        ranks = f"{transport.world} ranks" if transport.world > 1 else "one process"
        prompt = f': "{printable(plan.request.prompt)}"'
        introduce(transport, order, f"{in_words(plan.request)} on {ranks}", prompt)
        log_cuts(checkpoint, [("", plan.request.prompt, plan.request.negative_prompt)])

    result = generate_with_bar(transport, order, plan)
    transport.doing = "save"
    if speaks:
        save_result(order, plan, result, transport.world)
    serial = make_serial(transport, order) if args.compare_serial else None
    transport.doing = "save"
    if speaks:
        report = make_report(plan.request, result, args.weights, transport.world)
        if args.report:
            write_report(order, report, result, serial)
        for line in summary(order, report, result, transport.world):
            log(line)
        log(str(args.out) if args.quiet else f"picture: {args.out}", result=True)


def generate_with_bar(transport: Transport, order: Order, plan: Plan) -> Result:
    """The picture, with a progress bar and a line where the stage changes."""
    speaks = transport.rank == 0
    bar = StepBar(plan.request.steps, "warm-up", speaks, TRACE)
    seen: list[StepRecord] = []

    def on_step(record: StepRecord) -> None:
        if speaks and seen and record.stage != seen[-1].stage:
            switch = record.switch
            why = f" (tau1 = {switch.tau1} by {switch.reason}, tau2 = {switch.tau2})" if switch else ""
            log(f"step {record.step}: {seen[-1].stage} -> {record.stage}{why}")
        seen.append(record)
        transport.heartbeat()
        bar.step(record.stage)

    result = generate(order.checkpoint, plan, transport, order.device, on_step, Profile(order.device))
    bar.close()
    return result


def save_result(order: Order, plan: Plan, result: Result, ranks: int) -> None:
    """Write the picture, and the latents if they are wanted. Sets args.out to the name that it got."""
    args, request = order.args, plan.request
    wanted, settings = args.out, settings_of(request, args.weights, ranks)
    images, names = (result.image, result.records[-1].latents), (args.out, args.save_latents)
    how = {"numbered": order.numbered, "run": this_run()}
    args.out = save_both(*images, *names, request.seed, settings, args.overwrite, **how)
    if args.out != wanted:
        log(f"{wanted} was made by another run meanwhile: this picture is {args.out}")


def make_serial(transport: Transport, order: Order) -> Result | None:
    """The same picture by serial on rank 0, None on the others; they hear of every step, so that they do not give up."""
    request = replace(order.plan.request, strategy="serial", balance=False)
    if transport.rank:
        for _ in range(request.steps):
            transport.all_gather("serial")
        return None
    bar = StepBar(request.steps, "serial", True, TRACE)

    def on_step(record: StepRecord) -> None:
        transport.all_gather("serial")
        transport.heartbeat()
        bar.step("serial")

    plan = plan_picture(order.checkpoint, request, 1)
    result = generate(order.checkpoint, plan, LocalTransport(), order.device, on_step)
    bar.close()
    return result


def write_report(order: Order, report: dict, result: Result, serial: Result | None) -> None:
    """Write report.json and report.html, with the picture by serial if there is one."""
    args = order.args
    if serial:
        distance = psnr(result.image, serial.image)
        seconds = sum(record.seconds for record in serial.records)
        report["serial"] = {"equal": distance is None, "psnr": distance, "seconds": seconds}
    page = make_page(report, order.plan.request, result, serial.image if serial else None)
    try:
        save_report(report, args.report, args.overwrite)
        save_page(page, args.report, args.overwrite)
    except UsageError as error:
        raise UsageError(f"{error} The picture is in {args.out}.") from None
    if serial:
        log(against_serial(report))


def summary(order: Order, report: dict, result: Result, ranks: int) -> list[str]:
    """The last lines of output, except for the picture's path."""
    request, lines = order.plan.request, in_use(result.use)
    if request.strategy == "paper" and result.switch is None:
        lines = ["the switch never came: every step was condition partitioning", *lines]
    seconds = ", ".join(f"{phase} {max(seconds):.2f}" for phase, seconds in result.seconds.items())
    lines.append(f"seconds{' of the slowest rank' if ranks > 1 else ''}: {seconds}")
    lines.append(f"exact: {report['exact']['words']}")
    if ranks > 1:
        lines.append(f"bytes sent: {report['bytes_sent']['total']}")
    lines.append(f"seed: {request.seed}")
    return lines + ([f"report: {order.args.report / 'report.html'}"] if order.args.report else [])


def answer(order: Order) -> None:
    """What --check and --explain print, what --decode makes: rank 0 alone does it."""
    args, checkpoint = order.args, order.checkpoint
    if args.decode:
        latents, seed, settings = read_latents(args.decode, checkpoint.config("vae").latent_channels)
        torch.set_num_threads(args.threads)
        image = decode(checkpoint, latents, choose_device(args.device), args.tiles)
        path = save_picture(image, args.out, seed, settings, args.overwrite, order.numbered, this_run())
        log(str(path) if args.quiet else f"picture: {path}", result=True)
    elif args.check:
        log(describe(checkpoint, t5=not args.no_t5), result=True)
        if not needs(checkpoint):
            log_cuts(checkpoint, texts_to_check(order))
    else:
        request = order.plan.request
        log(explain(request.strategy, order.plan, meta_task(checkpoint, order.plan)), result=True)
        log_cuts(checkpoint, [("", request.prompt, request.negative_prompt)])


def main() -> int:
    """Exit status: 0 well, 1 failed on the way (or --check found something missing), 2 refused before any work."""
    transport = Transport()  # until the ranks have met
    if problem := started_without_torchrun():
        tasks = (os.environ.get(name, "0") for name in ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"))
        if set(tasks) == {"0"}:
            log(problem, error=True)  # one task speaks
        return 2
    try:
        transport = connect(asked_timeout(), last_words=lambda sentence: log(sentence, error=True))
        return run(transport)
    except UsageError as error:  # ranks that cannot meet
        log(str(error), error=True)
        return 2
    except (Exception, KeyboardInterrupt) as error:
        interrupted = by_interrupt(error, lost=isinstance(error, PeerLost))
        if TRACE:
            traceback.print_exc()
        words = str(error)
        if interrupted:
            words = "interrupted" if place()[0] == 0 else None
        elif not isinstance(error, PeerLost):
            words = in_a_sentence(error, place()[0], transport.step, transport.doing)
        if words:
            log(words, error=True)
        if isinstance(error, PeerLost):
            record_failure(str(error), later=2)
        if os.environ.get("WORLD_SIZE", "1") != "1":  # also where the ranks have not met
            os._exit(1)  # at once: torch.distributed would wait for the others
        return 1


def run(transport: Transport) -> int:
    """The whole of a rank's work; exit status as for `main`."""
    order, problem = None, None
    try:
        order = prepare(transport)
    except (UsageError, WeightsError) as error:
        problem = str(error)
    wish = order.wish if order else "pictures"
    found = order and order.found and str(order.found)
    problems, wishes, found = zip(*transport.all_gather((problem, wish, found)))
    problem = next((sentence for sentence in problems if sentence), None)  # all ranks stop if one must
    other = next((rank for rank, theirs in enumerate(wishes) if theirs != wishes[0]), None)
    if problem is None and other is not None:
        problem = f"The ranks disagree about what to do: rank 0 is asked for {wishes[0]}, rank {other} for {wishes[other]}; start all of them alike."
    if problem is not None:
        status = refuse(transport, problem)
    elif found[0]:
        status = 0
        if transport.rank == 0:
            log("the picture was finished before this run was restarted")
            log(found[0] if order.args.quiet else f"picture: {found[0]}", result=True)
    elif wish != "pictures":
        status = answer_on_rank_0(transport, order)
    else:
        status = make_pictures(transport, order)
    finish_despite_interrupts()
    transport.shutdown()  # nobody leaves before rank 0 has spoken
    return status


def refuse(transport: Transport, problem: str) -> int:
    """Say on rank 0, and record on all, why nothing is done."""
    record_failure(problem)
    if transport.rank == 0:
        log(problem, error=True)
    return 2


def answer_on_rank_0(transport: Transport, order: Order) -> int:
    """`answer`, with a status that all ranks share."""
    status, problem = 0, None
    if order.args.check and (lacking := needs(order.checkpoint)):
        status, problem = 1, " ".join(lacking)
    if transport.rank == 0:
        try:
            answer(order)
        except (UsageError, WeightsError) as error:
            log(str(error), error=True)
            status, problem = 2, str(error)
    status, problem = transport.all_gather((status, problem))[0]
    if problem:
        record_failure(problem)
    return status


def make_pictures(transport: Transport, order: Order) -> int:
    """One picture, or several; a problem that only shows on the way ends all ranks at once."""
    try:
        problem, batch = disagreement(transport, order), None
        if order.several and problem is None:
            batch = begin_several(transport, order)
    except SharedError as error:
        problem = str(error)
    if problem:
        return refuse(transport, problem)
    try:
        if order.several:
            return make_several(transport, order, *batch)
        seed = transport.all_gather(order.plan.request.seed)[0]
        order.plan = order.plan._replace(request=replace(order.plan.request, seed=seed))
        transport.divide(order.replica_size)
        if transport.replica == 0:
            make_picture(transport, order)
        transport.wait_for_all()
        return 0
    except (UsageError, WeightsError) as error:  # found on the way, such as a full disk
        record_failure(str(error))
        shared = isinstance(error, SharedError)
        if transport.rank == 0 or not shared:
            log(str(error) if shared or place()[1] == 1 else f"rank {place()[0]}: {error}", error=True)
        if transport.world > 1:
            if shared:
                transport.shutdown_together()
            os._exit(1)  # at once: the others see it and end too
        return 1


if __name__ == "__main__":
    prepare_streams()
    end_on_interrupt(speaks=os.environ.get("RANK", "0") == "0")
    status = main()
    end_of_work()
    sys.exit(status)
