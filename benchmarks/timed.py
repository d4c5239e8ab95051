"""The processes of `benchmarks/speed.py`: each is one rank with one thread, which times parts or a whole run."""

import json
import os
import tempfile
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Callable, Sequence

import torch
import torch.multiprocessing as mp

from benchmarks.full_size import make_task
from hybridiff.denoise import Task, denoise
from hybridiff.strategies import Settings, Strategy
from hybridiff.transport import Mailbox, Transport, connect, disconnect
from tests.tiny import free_port

PARTS = ("entry", "inner", "exit", "whole", "whole, batch 2")


def runs_of(task: Task) -> dict[str, Callable]:
    """What runs each of PARTS under the prompt; "inner" and "exit" take what the last "entry" and "inner" gave."""
    net, cut, told, dtype = (
        task.denoiser,
        task.cuts[0],
        task.conditioning["cond"],
        task.conditioning["cond"].text.dtype,
    )
    x, t = task.noise.to(dtype), task.sampler.timesteps[:1].to(task.noise.device)
    both = task.batch("both")
    inwards = skips = outwards = None  # what crosses the cut, and what stays

    def entry():
        nonlocal inwards, skips
        inwards, skips = net.entry(x, t, told, cut)

    def inner():
        nonlocal outwards
        outwards = net.inner(inwards, t, told, cut)

    runs = (
        entry,
        inner,
        lambda: net.exit(outwards, skips, t, told, cut),
        lambda: net(x, t, told),
        lambda: net(x.repeat(2, 1, 1, 1), t.repeat(2), both),
    )
    return dict(zip(PARTS, runs))


@torch.inference_mode()
def time_runs(
    runs: dict[str, Callable], transport: Transport, repeats: int, cuda: bool
) -> dict[str, list[float]]:
    """Seconds of each run, `repeats` times, one after the other. All ranks start each together."""
    seconds: dict[str, list[float]] = {part: [] for part in runs}
    for _ in range(repeats):
        for part, run in runs.items():
            transport.gather(None)
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize()
            seconds[part].append(time.perf_counter() - start)
    return seconds


def time_parts(
    task: Task, transport: Transport, repeats: int, wanted: Sequence[str] = PARTS
) -> dict[str, list[float]]:
    """Seconds of each of the wanted PARTS, `repeats` times; "entry", "inner" and "exit" are wanted together."""
    return time_runs(
        {part: run for part, run in runs_of(task).items() if part in wanted},
        transport,
        repeats,
        task.noise.is_cuda,
    )


def warm_parts(
    task: Task, transport: Transport, repeats: int, wanted: Sequence[str] = PARTS
) -> dict[str, list[float]]:
    """The same after one run that does not count."""
    return {part: times[1:] for part, times in time_parts(task, transport, repeats + 1, wanted).items()}


def time_run(
    task: Task,
    transport: Transport,
    strategy: Strategy,
    settings: Settings,
    repeats: int,
    wanted: Sequence[str],
) -> dict:
    """Seconds of every step of a whole run and of all together; of the wanted parts, before and after it; bytes over all ranks.

    The parts before it are all that warms it up: the first step also makes the first exchange.
    """
    task = replace(task, cuts=strategy.cuts(task.denoiser))
    before = warm_parts(task, transport, repeats, wanted)
    transport.gather(None)  # all ranks start together
    start = time.perf_counter()
    records = list(denoise(task, strategy, settings, transport))
    total = time.perf_counter() - start
    counted, finite = dict(transport.finish()), bool(records[-1].latents.isfinite().all())
    after = time_parts(task, transport, repeats, wanted)
    parts = {part: before[part] + after[part] for part in before}
    return {
        "seconds": [r.seconds for r in records],
        "total": total,
        "parts": parts,
        "bytes": counted,
        "finite": finite,
    }


def time_diffusers(task: Task, transport: Transport, family: str, size: int, steps: int) -> dict:
    """The same of diffusers' own pipeline on one rank."""
    from benchmarks import diffusers_loop

    return diffusers_loop.run(task, family, size, steps)


def on_rank(rank: int, ranks: int, port: int, folder: str, body: Callable, given: tuple) -> None:
    """A process of `on_ranks`."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    transport = connect(timedelta(hours=1))
    transport.open_lanes(torch.device("cpu"))
    result = body(transport, *given)
    disconnect()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))


def on_ranks(ranks: int, body: Callable, *given: object) -> list:
    """What body(transport, *given) returns on every rank, as JSON has it; each is a process of its own with one thread."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(on_rank, (ranks, free_port(1), folder, body, given), nprocs=ranks)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]


def with_task(transport: Transport, where: dict, work: Callable, details: dict) -> dict:
    """Body of a rank: makes its task from `where` (family, size, steps, dtype, tiny, weights) and does its work."""
    return work(make_task(device="cpu", **where), transport, **details)


def on_ranks_with_task(ranks: int, where: dict, work: Callable, **details: object) -> list[dict]:
    """What work(task, transport, **details) returns on every rank; the ranks share the memory of the weights."""
    if not Path(where["weights"]).exists():
        make_task(device="cpu", **where)
    return on_ranks(ranks, with_task, where, work, details)


def parts_on_cuda(family: str, size: int, repeats: int, tiny: bool) -> dict[str, float]:
    """Seconds of each of PARTS in fp16 on the CUDA device, in this process: medians."""
    seconds = warm_parts(make_task(family, size, 1, torch.float16, tiny, "cuda"), Mailbox(), repeats)
    return {part: median(times) for part, times in seconds.items()}
