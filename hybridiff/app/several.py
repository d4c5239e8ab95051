"""Makes the pictures of a batch, each by the replica of ranks that is free; `batch.py` has the jobs and the manifest."""

import secrets
import time
import traceback

from hybridiff.app.batch import Job, Manifest, Progress, already_made, begin, line_of, make_jobs, take_turns
from hybridiff.app.console import in_a_sentence, in_options, log, record_failure
from hybridiff.app.files import save_picture, this_run
from hybridiff.app.introduce import introduce, log_cuts, set_up
from hybridiff.app.latents import rescue
from hybridiff.app.prepare import Order
from hybridiff.app.profile import Profile
from hybridiff.app.report.record import settings_of
from hybridiff.denoise import StepRecord
from hybridiff.distributed.transport import TRACE, Transport, place
from hybridiff.errors import PeerLost, UsageError, raise_together
from hybridiff.pipeline import Result, generate, plan_picture


def begin_several(transport: Transport, order: Order) -> tuple[Manifest, list[Job], list[Job]]:
    """(manifest, all pictures, those that are still to be made). SharedError where the folder holds what must stay, before any work.

    Where torchrun has restarted the ranks, the pictures of the attempt before are kept and it goes on with its seed; its manifest tells its run.
    """
    args = order.args
    run, again, seed, weights = transport.all_gather(this_run())[0], False, args.seed, None
    with raise_together(transport.all_gather):
        if transport.rank == 0:
            manifest = Manifest(args.out)
            again = run is not None and manifest.run() == run
            weights = order.checkpoint.digest()
            if seed is None and (args.resume or again) and manifest.path.exists():
                seed = manifest.read()[0]["seed"]
    drawn = secrets.randbelow(2**32) if seed is None else seed
    head = {"seed": drawn, "weights": weights, "run": run or secrets.token_hex(8)}
    again, head = transport.all_gather((again, head))[0]
    jobs = make_jobs(order.entries, args.images_per_prompt, head["seed"], args.out)
    only = run if again and args.overwrite and not args.resume else None
    settings = [settings_of_job(order, job) for job in jobs]
    manifest, left = begin(jobs, settings, head, args.resume or again, args.overwrite, only, transport)
    return manifest, jobs, left


def settings_of_job(order: Order, job: Job) -> dict:
    """The settings of a picture, as its file has them."""
    try:
        return settings_of(order.request(job.own), order.args.weights, order.replica_size)
    except UsageError:
        return dict(job.own)  # it will fail at its turn


def make_several(
    transport: Transport, order: Order, manifest: Manifest, jobs: list[Job], left: list[Job]
) -> int:
    """Make the pictures that are `left` of all `jobs`; exit status 1 unless every one is there in the end."""
    args, size = order.args, order.replica_size
    if transport.rank == 0:
        count = transport.world // size
        by = f"by {count} replica{'s' * (count > 1)} of {size}"
        log(f"{len(jobs)} pictures, {len(jobs) - len(left)} of them made before, {by}: {args.out}/")
        if order.comments:
            log(
                f'{args.prompts}: {order.comments} line{"s" * (order.comments > 1)} left out as comments, which begin with "# "'
            )
    transport.divide(size)
    set_up(transport, order)
    if transport.rank == 0 and transport.replica == 0:
        introduce(transport, order, order.plans)
        log_cuts(order.checkpoint, texts_of(order, left))
    order.checkpoint.keep = True
    progress = Progress(len(left), transport)
    for job in take_turns(left, transport):
        make_one(transport, order, manifest, job, progress)
    made, failed, found = (transport.add(outcome, 0) for outcome in ("made", "failed", "found"))
    found += len(jobs) - len(left)
    if transport.rank == 0 and transport.replica == 0:
        log(f"{made} pictures made, {failed} failed, {found} found; {manifest.path} lists them")
        if made + failed + found != len(jobs):
            log(f"{len(jobs)} pictures were asked for: give --resume to make those that lack.", error=True)
        if args.quiet:
            log(str(manifest.path), result=True)
    if failed:
        record_failure(f"{failed} pictures failed; {manifest.path} says why.")
    return 0 if failed == 0 and made + found == len(jobs) else 1


def texts_of(order: Order, jobs: list[Job]) -> list[tuple[str, str, str | None]]:
    """Name, prompt and negative prompt of pictures; those that cannot be made will fail at their turn."""
    texts = []
    for job in jobs:
        try:
            request = order.request(job.own)
        except UsageError:
            continue
        texts.append((job.path.name, request.prompt, request.negative_prompt))
    return texts


def make_one(transport: Transport, order: Order, manifest: Manifest, job: Job, progress: Progress) -> None:
    """Make a picture by this replica, and say what came of it: a line in the manifest, a count that all replicas share."""
    start, problem, outcome = time.monotonic(), None, "made"

    def on_step(record: StepRecord) -> None:
        transport.heartbeat()

    try:
        request = order.request(job.own)
        plan = plan_picture(order.checkpoint, request, transport.world)
        result = generate(order.checkpoint, plan, transport, order.device, on_step, Profile(order.device))
        if transport.rank == 0:
            outcome = save_job(result, job, order, request.seed, settings_of_job(order, job), manifest.run())
    except UsageError as error:
        problem = in_options(error)
    except PeerLost:
        raise
    except Exception as error:  # such as too little memory: the other ranks of the replica cannot go on alone
        problem = in_a_sentence(error, place()[0], transport.step, transport.doing)
        if transport.world > 1:
            manifest.add(line_of(job, "failed", why=problem))  # --resume makes it last
            raise
        transport.forget()
        if TRACE:
            traceback.print_exc()
    problem = next((sentence for sentence in transport.all_gather(problem) if sentence), None)
    if transport.rank == 0:
        seconds = time.monotonic() - start
        outcome = outcome if problem is None else "failed"
        transport.add(outcome)
        if outcome == "made":
            name = f"{job.path.name}: {seconds:.1f} s, seed {request.seed}"
            progress.ended(f"{name}, {job.own['prompt']!r:.60}")
            manifest.add(line_of(job, "made", seconds=round(seconds, 2), team=transport.replica))
        elif outcome == "failed":
            if order.args.quiet:
                log(f"{job.path.name} failed: {problem}", error=True)
            progress.ended(f"{job.path.name} failed: {problem}")
            manifest.add(line_of(job, "failed", why=problem))
        else:
            progress.ended(f"{job.path.name} was made by another run meanwhile")


def save_job(result: Result, job: Job, order: Order, seed: int, settings: dict, run: str | None) -> str:
    """Write a picture of a batch: "made", or "found" where another run of the same batch has just made it. UsageError where that fails; its latents are kept."""
    run = run if run == this_run() else None
    try:
        save_picture(result.image, job.path, seed, settings, order.args.overwrite, run=run)
        return "made"
    except UsageError as error:
        if already_made(job, settings):
            return "found"
        kept = rescue(result.records[-1].latents, seed, settings)[1]
        raise UsageError(f"{error} {kept}") from None
