"""The processes of `benchmarks/speed.py`: each is one rank with one thread, which times parts or a whole run."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.multiprocessing as mp

from hybridiff.denoise import Task, denoise
from hybridiff.distributed.transport import LocalTransport, Transport, connect, disconnect
from hybridiff.partition import Partition, partition
from hybridiff.schedule import Run
from hybridiff.strategies import Settings, Strategy
from models.tape import Features, Span
from tests.full_size import make_task
from tests.tiny import free_port

PARTS = ("entry", "inner", "exit", "whole", "whole, batch 2")


def part_of(run: Run, division: Partition) -> str:
    """Which of PARTS a run is. Of three spans the first is the entry and the last the exit; of two the first is the inner part."""
    if run.branch == "both":
        return "whole, batch 2"
    if run.span == (0, division.units):
        return "whole"
    return PARTS[3 - len(division.spans) + division.spans.index(run.span)]


def runs_of(task: Task, division: Partition) -> dict[str, Callable]:
    """What runs each of PARTS under the prompt; a span takes what the last run of the span before it gave."""
    net, told = task.denoiser, task.conditioning["cond"]
    x, t = task.noise.to(told.text.dtype), task.sampler.timesteps[:1].to(task.noise.device)
    both, size = task.batch("both"), task.noise.shape[2:]
    crossing: dict[int, tuple[Features, dict]] = {0: (x, {})}  # position -> what `run` gave and kept

    def run(span: Span) -> None:
        features, kept = crossing[span[0]]
        kept = dict(kept)  # a run changes it
        crossing[span[1]] = net.run(span, features, kept, t, told, size), kept

    runs = {part_of(division.run(span, "cond"), division): partial(run, span) for span in division.spans}
    return runs | {
        "whole": lambda: net(x, t, told),
        "whole, batch 2": lambda: net(x.repeat(2, 1, 1, 1), t.repeat(2), both),
    }


@torch.inference_mode()
def time_runs(
    runs: dict[str, Callable], transport: Transport, repeats: int, cuda: bool
) -> dict[str, list[float]]:
    """Seconds of each run, `repeats` times, one after the other. All ranks start each together."""
    seconds: dict[str, list[float]] = {part: [] for part in runs}
    for _ in range(repeats):
        for part, run in runs.items():
            transport.all_gather(None)
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize()
            seconds[part].append(time.perf_counter() - start)
    return seconds


def time_parts(
    task: Task, transport: Transport, division: Partition, repeats: int, wanted: Sequence[str] = PARTS
) -> dict[str, list[float]]:
    """Seconds of each of the wanted PARTS, `repeats` times; the spans are wanted together."""
    return time_runs(
        {part: run for part, run in runs_of(task, division).items() if part in wanted},
        transport,
        repeats,
        task.noise.is_cuda,
    )


def warm_parts(
    task: Task, transport: Transport, division: Partition, repeats: int, wanted: Sequence[str] = PARTS
) -> dict[str, list[float]]:
    """The same after one run that does not count."""
    seconds = time_parts(task, transport, division, repeats + 1, wanted)
    return {part: times[1:] for part, times in seconds.items()}


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
    before = warm_parts(task, transport, strategy.partition, repeats, wanted)
    transport.all_gather(None)  # all ranks start together
    start = time.perf_counter()
    records = list(denoise(task, strategy, settings, transport))
    total = time.perf_counter() - start
    counted, finite = dict(transport.flush()), bool(records[-1].latents.isfinite().all())
    after = time_parts(task, transport, strategy.partition, repeats, wanted)
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
    from benchmarks.timing import diffusers_loop

    return diffusers_loop.run(task, family, size, steps)


def on_rank(rank: int, ranks: int, port: int, folder: str, body: Callable, given: tuple) -> None:
    """A process of `on_ranks`."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    transport = connect(timedelta(hours=1))
    transport.open_channels(torch.device("cpu"))
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
    task = make_task(family, size, 1, torch.float16, tiny, "cuda")
    seconds = warm_parts(task, LocalTransport(), partition(task.denoiser, 2), repeats)
    return {part: median(times) for part, times in seconds.items()}
