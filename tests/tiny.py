"""Tiny seeded denoisers and tasks, and a way to run a function on spawned gloo ranks."""

import os
import random
import socket
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.multiprocessing as mp

from hybridiff.denoise import Task, denoise
from hybridiff.distributed.transport import LocalTransport, connect, disconnect
from hybridiff.samplers import make_sampler
from hybridiff.strategies import STRATEGIES, Reuse, Settings, Strategy
from hybridiff.switching import SwitchRule
from models import family_of
from models.mmdit import MMDiT, MMDiTConditioning, MMDiTConfig
from models.tape import spans_between
from models.unet import UNet, UNetConditioning, UNetConfig

UNET = UNetConfig(
    channels=16,
    depths=(0, 1, 1),
    middle_depth=1,
    heads=(1, 2, 4),
    context_width=24,
    vector_width=20,
    groups=8,
)
MMDIT = MMDiTConfig(
    latent_channels=4,
    width=32,
    depth=6,
    heads=2,
    context_width=24,
    pooled_width=20,
    positions=12,
    qk_norm=True,
)


def make_task(
    family: str,
    steps: int,
    seed: int = 0,
    guidance: float = 5.0,
    sampler: str | None = None,
    dual: int = 0,
) -> Task:
    """A task on random weights; the same seed gives the same task in every process."""
    torch.manual_seed(seed)
    denoiser = UNet(UNET) if family == "sdxl" else MMDiT(replace(MMDIT, dual_blocks=dual))
    for tensor in denoiser.state_dict().values():  # no zeros that could hide a wrong path
        tensor.normal_(std=0.08)
    kind = UNetConditioning if family == "sdxl" else MMDiTConditioning
    conditioning = {text: kind(torch.randn(1, 6, 24), torch.randn(1, 20)) for text in ("cond", "uncond")}
    noise = torch.randn(1, 4, 8, 12)
    return Task(
        denoiser.eval(),
        make_sampler(family_of(family).prediction, sampler, steps),
        conditioning,
        guidance,
        noise,
    )


def run(
    family: str,
    strategy: str,
    steps: int,
    rule: SwitchRule | Reuse,
    transport=None,
    ranks: int | None = None,
    cut: int | None = None,
    **options,
) -> dict:
    """Latents after every step, stages, discrepancies and bytes, in one process or on this rank.

    `cut`: where two ranks split the network, if elsewhere than usual: after so many blocks of the MMDiT or input blocks of the U-Net.
    """
    torch.set_num_threads(1)
    transport = transport or LocalTransport()
    task = make_task(family, steps, **options)
    chosen = STRATEGIES[strategy].on(task.denoiser, ranks)
    if cut:
        chosen = split_at(chosen, cut)
    settings = Settings(steps, reuse=rule) if isinstance(rule, Reuse) else Settings(steps, rule)
    records = list(denoise(task, chosen, settings, transport))
    return {
        "latents": torch.stack([r.latents for r in records]),
        "stages": [r.stage for r in records],
        "discrepancies": [r.discrepancy for r in records],
        "bytes": dict(transport.flush()),
    }


def on_rank(rank: int, ranks: int, port: int, folder: str, arguments: list[tuple[tuple, dict]]) -> None:
    """Body of a spawned rank: performs every run and saves what it saw."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for i, (positional, named) in enumerate(arguments):
        os.environ["MASTER_PORT"] = str(port + i)
        transport = connect(timedelta(seconds=60))
        transport.open_channels(torch.device("cpu"))
        torch.save(run(*positional, transport=transport, **named), Path(folder) / f"{i}-{rank}.pt")
        disconnect()


def free_port(count: int) -> int:
    """The first of `count` ports in a row that are free just now, from below those that Linux gives to outgoing connections (32768
    and up): such a connection, of an earlier run of the row, could else take a port before its turn."""
    while True:
        port, sockets = random.SystemRandom().randrange(20000, 32000 - count), []
        try:
            for i in range(count):
                sockets.append(socket.socket())
                sockets[-1].bind(("127.0.0.1", port + i))
            return port
        except OSError:
            continue
        finally:
            for s in sockets:
                s.close()


def run_on_ranks(folder: Path, arguments: list[tuple[tuple, dict]], ranks: int = 2) -> list[list[dict]]:
    """For each set of arguments of `run`, the results of all ranks, from one set of spawned processes."""
    mp.spawn(on_rank, (ranks, free_port(len(arguments)), str(folder), arguments), nprocs=ranks)
    return [[torch.load(folder / f"{i}-{rank}.pt") for rank in range(ranks)] for i in range(len(arguments))]


def split_at(strategy: Strategy, cut: int) -> Strategy:
    """A strategy of two ranks that splits the network after so many blocks, or input blocks of the U-Net."""
    units, nested = strategy.partition.units, len(strategy.partition.spans) == 3
    spans = spans_between((cut, units - cut) if nested else (cut,), units)
    return replace(strategy, partition=strategy.partition._replace(spans=spans))
