"""report.json: what happened, as a table."""

import json
import platform
from pathlib import Path

import torch

import hybridiff
from hybridiff.app.files import write_whole
from hybridiff.app.profile import totals
from hybridiff.pipeline import Result, decoded_together
from hybridiff.request import Request
from hybridiff.switching import MIDDLE
from hybridiff.tiles import LARGE


def settings_of(request: Request, weights: str, ranks: int) -> dict:
    """The request as plain values."""
    rule = request.rule
    return {
        "weights": weights, "ranks": ranks, "strategy": request.strategy, "sampler": request.sampler,
        "prompt": request.prompt, "negative_prompt": request.negative_prompt, "steps": request.steps,
        "guidance": request.guidance, "height": request.height, "width": request.width,
        "window": rule.window, "slope": rule.slope, "cap": rule.cap, "interval": rule.interval,
        "start": request.reuse.start, "reused": request.reuse.count,
        "dtype": str(request.dtype).removeprefix("torch."), "tiles": request.tiles, "t5": request.t5,
        "balance": request.balance,
    }  # fmt: skip


def exactness(request: Request, result: Result, ranks: int) -> dict:
    """How much of the picture is, bit for bit on like devices, what `serial` makes: steps from the first on, the decoder, and both in words."""
    stages = [record.stage for record in result.records]
    # kernels round by the number of rows
    rounds = request.strategy == "batched" or "keys" in result.bytes_sent
    first = next((step for step, stage in enumerate(stages) if stage in MIDDLE), len(stages))
    steps = 0 if rounds else first
    size = request.height * request.width
    if request.tiles and size > LARGE:
        decoder = "in tiles"
    else:
        decoder = f"by {ranks} ranks together" if decoded_together(request, ranks) else "whole"
    words = (
        "every step"
        if steps == len(stages)
        else f"the first {steps} of {len(stages)} steps"
        if steps
        else "no step"
    )
    words += " as serial computes it" + (
        " (tokens divided among ranks round otherwise)" if "keys" in result.bytes_sent else ""
    )
    words += "" if decoder == "whole" else f"; decoded {decoder}, which rounds otherwise"
    return {"steps": steps, "of": len(stages), "decoder": decoder == "whole", "words": words}


def make_report(request: Request, result: Result, weights: str, ranks: int) -> dict:
    """The report: steps, tau1, tau2 (None where it never switched), seconds, bytes, seed, settings, versions.

    "ranks" holds for every rank of the schedule and every step the measured seconds by what they went into, "seconds" those of
    every process by phase.
    """
    steps = [
        {"stage": r.stage, "discrepancy": r.discrepancy, "slope": r.slope, "seconds": r.seconds}
        for r in result.records
    ]
    spent = totals(result.bars)
    switch = result.switch
    return {
        "steps": steps,
        "ranks": [
            [spent[rank, record.step] for record in result.records]
            for rank in sorted({bar.rank for bar in result.bars})
        ],
        "tau1": switch.tau1 if switch else None,
        "tau2": switch.tau2 if switch else None,
        "exact": exactness(request, result, ranks),
        "seconds": result.seconds,
        "memory": result.memory,
        "use": result.use,
        "bytes_sent": {"total": sum(result.bytes_sent.values()), "by_operation": result.bytes_sent},
        "seed": request.seed,
        "settings": settings_of(request, weights, ranks),
        "versions": {
            "hybridiff": hybridiff.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def in_use(use: dict) -> list[str]:
    """Lines on how the ranks were used, where it is not the usual way: cuts that were chosen, ranks that idled or hold less than others."""
    spans = ", ".join(f"{start}-{stop - 1}" for start, stop in use["cuts"])
    lines = (
        [f"spans of units {spans}, after timing every unit on each rank"] if use["seconds_of_units"] else []
    )
    if len(set(use["weights"])) > 1:
        lines.append(
            "denoiser's weights held, MB: "
            + ", ".join(f"rank {rank} {held / 1e6:,.1f}" for rank, held in enumerate(use["weights"]))
        )
    return lines + ([use["idle"]] if use["idle"] else [])


def save_report(report: dict, folder: Path, overwrite: bool = True) -> None:
    """Write folder/report.json."""
    text = json.dumps(report, indent=1) + "\n"
    write_whole(folder / "report.json", lambda temporary: temporary.write_text(text), overwrite)
