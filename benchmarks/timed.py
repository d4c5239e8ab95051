"""The processes of `benchmarks/speed.py`: each is one rank with one thread, which times parts or a whole run."""

import json
import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Callable

import torch
import torch.multiprocessing as mp

from benchmarks.full_size import make_task
from hybridiff.denoise import Task, denoise
from hybridiff.strategies import Settings, Strategy
from hybridiff.transport import Mailbox, Transport, connect, disconnect
from tests.tiny import free_port

PARTS = ("entry", "inner", "exit", "whole", "whole, batch 2")


@torch.inference_mode()
def time_parts(task: Task, transport: Transport, repeats: int) -> dict[str, list[float]]:
    """Seconds of each of PARTS, `repeats` times, after one run that does not count. All ranks start each together."""
    net, cut, told, dtype = task.denoiser, task.cuts[0], task.conditioning["cond"], task.conditioning["cond"].text.dtype
    x, t = task.noise.to(dtype), task.sampler.timesteps[:1].to(task.noise.device)
    both = task.batch("both")
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}

    def clock(part: str, run: Callable):
        transport.gather(None)
        if task.noise.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = run()
        if task.noise.is_cuda:
            torch.cuda.synchronize()
        seconds[part].append(time.perf_counter() - start)
        return result

    for _ in range(repeats + 1):
        crossing, skips = clock("entry", lambda: net.entry(x, t, told, cut))
        crossing = clock("inner", lambda: net.inner(crossing, t, told, cut))
        clock("exit", lambda: net.exit(crossing, skips, t, told, cut))
        clock("whole", lambda: net(x, t, told))
        clock("whole, batch 2", lambda: net(x.repeat(2, 1, 1, 1), t.repeat(2), both))
    return {part: times[1:] for part, times in seconds.items()}


def time_run(task: Task, transport: Transport, strategy: Strategy, settings: Settings) -> dict:
    """Seconds of every step of a whole run and of all together, after one step that does not count; bytes over all ranks."""
    list(denoise(task, strategy, Settings(1, settings.rule), transport))
    transport.finish()
    transport.sent.clear()
    transport.gather(None)  # all ranks start together
    start = time.perf_counter()
    records = list(denoise(task, strategy, settings, transport))
    total = time.perf_counter() - start
    finite = bool(records[-1].latents.isfinite().all())
    return {"seconds": [r.seconds for r in records], "total": total, "bytes": dict(transport.finish()), "finite": finite}


def on_rank(rank: int, ranks: int, port: int, folder: str, where: dict, work: str, details: dict) -> None:
    """Body of a rank. `where`: family, size, steps, dtype, tiny, weights; `work`: "parts", "run" or "diffusers"."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    task = make_task(device="cpu", **where)
    if work == "diffusers":
        from benchmarks import diffusers_loop

        result = diffusers_loop.run(task, where["family"], where["size"], where["steps"])
    else:
        transport = connect(timedelta(hours=1))
        transport.open_lanes(torch.device("cpu"))
        result = (time_parts if work == "parts" else time_run)(task, transport, **details)
        disconnect()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))


def on_ranks(ranks: int, where: dict, work: str, **details: object) -> list[dict]:
    """The results of all ranks, from processes of their own, which share the memory of the weights."""
    if not Path(where["weights"]).exists():
        make_task(device="cpu", **where)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(on_rank, (ranks, free_port(1), folder, where, work, details), nprocs=ranks)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]


def parts_on_cuda(family: str, size: int, repeats: int, tiny: bool) -> dict[str, float]:
    """Seconds of each of PARTS in fp16 on the CUDA device, in this process: medians."""
    seconds = time_parts(make_task(family, size, 1, torch.float16, tiny, "cuda"), Mailbox(), repeats)
    return {part: median(times) for part, times in seconds.items()}
