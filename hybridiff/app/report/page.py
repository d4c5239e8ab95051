"""The report's page: the words, numbers, tables and charts that template.html puts in order. No scripts, nothing from the network."""

import base64
import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from hybridiff.app.explain import detail
from hybridiff.app.files import write_whole
from hybridiff.app.report.charts import discrepancy_chart, slope_chart, stretches, timeline_chart
from hybridiff.app.report.record import in_use
from hybridiff.pipeline import Result
from hybridiff.request import Request
from hybridiff.switching import MIDDLE, Switch

TEMPLATE = Path(__file__).with_name("template.html")
MIDDLE_WORDS = {  # on the pipelined or skipped steps, by strategy
    "paper": "These are pipelined steps: the two predictions are treated as one. The network itself is cut into as many spans as "
    "there are ranks, and each rank evaluates only its own, on what other ranks made one step earlier. There is one prediction and no guidance: cheaper, and "
    "no longer exact.",
    "step-extrapolation": "Some of these steps, evenly spread, are skipped: they are not computed, and their guided prediction is extrapolated from the last two "
    "computed ones. The steps between them are computed in full.",
    "inner-reuse": "Some of these steps, evenly spread, are skipped steps: each rank evaluates only the outer parts of the network, and the inner features are "
    "extrapolated from the last two full steps.",
    "guided-pipeline": "One rank evaluates the outer parts of the network, the other the inner part, for one branch a step, in turns. The prediction of the other "
    "branch is extrapolated from its last two, so that guidance stays.",
}
BYTES_WORDS = {
    "prediction": "predictions of the whole network",
    "features": "features between two parts of the network",
    "keys": "keys and values of a rank's tokens",
    "discrepancy": "the measured discrepancy, one number a step",
}


KINDS = ("compute", "send", "wait", "other")  # of measured time


def psnr(image: Tensor, reference: Tensor) -> float | None:
    """Peak signal-to-noise ratio of two (H, W, 3) uint8 images in dB; None where they are equal."""
    error = (image.double() - reference.double()).square().mean().item()
    return 10 * torch.log10(torch.tensor(255.0**2 / error, dtype=torch.float64)).item() if error else None


def data_uri(image: Tensor) -> str:
    """A (H, W, 3) uint8 image as the source of an <img>: a PNG inside the page."""
    file = io.BytesIO()
    Image.fromarray(image.numpy()).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def against_serial(report: dict) -> str:
    """One line on a report with a serial picture: how near it is, and how much faster the denoising was."""
    serial, seconds = report["serial"], denoising(report)
    near = "the same pixels" if serial["equal"] else f"PSNR {serial['psnr']:.1f} dB"
    one_process = len(report["ranks"]) > report["settings"]["ranks"]
    return (
        f"against serial: {near}, {serial['seconds'] / seconds:.2f} times as fast ({seconds:.2f} s of denoising, serial"
        f" {serial['seconds']:.2f} s{'; one process played all ranks in turn' if one_process else ''})"
    )


def denoising(report: dict) -> float:
    """Seconds of all steps."""
    return sum(step["seconds"] for step in report["steps"])


def step_range(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first} to {last}"


def only_stage(strategy: str) -> str | None:
    """What happens in every step, for the strategies that never change what they do."""
    if strategy in ("serial", "batched"):
        return "One process evaluates the network with the prompt and without it, in every step."
    if strategy == "one-branch":
        return "Without guidance the network is evaluated once a step, with the prompt."
    return None


def stages(report: dict) -> list[dict]:
    """The stages in order: name, steps, seconds, and what happens in them."""
    words = {
        "warm-up": full_step_words(report),
        "fully-connecting": "As in the warm-up again, so that guidance can settle the details.",
    }
    return [
        {
            "name": stage,
            "steps": step_range(first, last),
            "seconds": sum(step["seconds"] for step in report["steps"][first : last + 1]),
            "words": words.get(stage) or MIDDLE_WORDS[report["settings"]["strategy"]],
        }
        for stage, first, last in stretches([step["stage"] for step in report["steps"]])
    ]


def full_step_words(report: dict) -> str:
    """What the ranks do where both branches are evaluated."""
    ranks, divided = len(report["ranks"]), "keys" in report["bytes_sent"]["by_operation"]
    share = "Each rank evaluates the whole network, one with the prompt and one without."
    if ranks > 2:
        share = "The first half of the ranks works without the prompt, the second with it. In each half "
        share += (
            "every rank evaluates its share of the picture and of the text."
            if divided
            else "one rank evaluates the whole network, the others wait."
        )
    return (
        share
        + " They exchange the two predictions. The result is what one device would compute"
        + (", but for rounding." if divided else ".")
    )


def why(switch: Switch | None, settings: dict) -> str:
    """Why the stage changed, or that it never did."""
    if settings["strategy"] != "paper":
        return "This strategy does not look at the curve; it is only measured, in the steps that evaluate both branches."
    if switch is None:
        return "It never switched in these steps: all of them were guided."
    if switch.reason == "slope":
        return (
            f"From step {switch.tau1 - settings['window'] + 1} to step {switch.tau1} the curve fell by less than g = {settings['slope']:g} a step on "
            f"average (the dashed line above, the circled dot below): tau1 = {switch.tau1}, and tau2 = tau1 + {settings['interval']} = {switch.tau2}."
        )
    return (
        f"The slope had not decided before step {switch.tau1}, so the cap did (the upright dashed line): tau1 = {switch.tau1}, and "
        f"tau2 = tau1 + {settings['interval']} = {switch.tau2}."
    )


def curve(report: dict, request: Request, switch: Switch | None) -> dict | None:
    """Charts of the discrepancy and of its average fall, and why the stage changed; None where no step measured it."""
    names, values, falls = (
        [step[key] for step in report["steps"]] for key in ("stage", "discrepancy", "slope")
    )
    if all(value is None for value in values):
        return None
    measured = any(fall is not None for fall in falls)  # there were steps enough to look back over
    return {
        "stages": [(stage, stage) for stage, _, _ in stretches(names)],
        "chart": discrepancy_chart(values, names, request.rule, switch),
        "why": why(switch, report["settings"]),
        "slopes": slope_chart(falls, names, request.rule, switch) if measured else None,
    }


def timeline(report: dict, result: Result) -> dict:
    """Each rank's measured time: charts of the whole run and of the steps around the switch, sums by stage, and every step."""
    names, ranks = [step["stage"] for step in report["steps"]], report["ranks"]
    zoom = None
    if middle := [step for step, stage in enumerate(names) if stage in MIDDLE]:
        first, last = (min(max(step, 0), len(names) - 1) for step in detail(middle))
        bars = [bar for bar in result.bars if first <= bar.step <= last]
        zoom = {"steps": step_range(first, last), "chart": timeline_chart(bars, len(ranks), names)}
    by_stage = [
        [f"rank {rank}, {stage}", *(f"{sum(step[kind] for step in steps[a : b + 1]):.3f}" for kind in KINDS)]
        for rank, steps in enumerate(ranks)
        for stage, a, b in stretches(names)
    ]
    by_step = [
        [f"{i}, rank {rank}", *(f"{1000 * steps[i][kind]:.2f}" for kind in KINDS)]
        for i in range(len(names))
        for rank, steps in enumerate(ranks)
    ]
    chart = timeline_chart(result.bars, len(ranks), names)
    return {"chart": chart, "detail": zoom, "by_stage": by_stage, "by_step": by_step}


def bytes_rows(sent: dict) -> list[list[str]]:
    """Bytes by what was sent, and together; no rows where nothing was."""
    rows = [[BYTES_WORDS.get(kind, kind), f"{count:,}"] for kind, count in sent["by_operation"].items()]
    return [*rows, ["together", f"{sent['total']:,}"]] if sent["total"] else []


def memory_table(ranks: list[dict]) -> dict:
    """The highest memory of every rank in every phase, in MB, of the host and of the GPU."""
    columns = [(rank, where) for rank, memory in enumerate(ranks) for where in memory["peak"]]
    # rank 0 alone decodes, so the ranks need not have the same phases
    phases = list(dict.fromkeys(phase for memory in ranks for phase in memory["phases"]))

    def row(name: str, sizes: list[dict]) -> list[str]:
        return [name, *(f"{sizes[r][where] / 1e6:,.0f}" if where in sizes[r] else "" for r, where in columns)]

    rows = [row(phase, [memory["phases"].get(phase, {}) for memory in ranks]) for phase in phases]
    rows.append(row("the highest", [memory["peak"] for memory in ranks]))
    head = ["phase, MB", *(f"rank {rank}{', GPU' if where == 'gpu' else ''}" for rank, where in columns)]
    return {"head": head, "rows": rows, "gpu": "gpu" in ranks[0]["peak"]}


def phases_table(report: dict) -> dict:
    """Seconds by phase, of every process."""
    processes = report["settings"]["ranks"]
    head = ["phase", *([f"rank {rank}" for rank in range(processes)] if processes > 1 else ["seconds"])]
    rows = [[phase, *(f"{s:.2f}" for s in seconds)] for phase, seconds in report["seconds"].items()]
    return {"head": head, "rows": rows}


def facts(report: dict, switch: Switch | None) -> list[tuple[str, object]]:
    """The numbers in the cards, with their names."""
    processes, ranks = report["settings"]["ranks"], len(report["ranks"])
    rows: list[tuple[str, object]] = [("seconds of denoising", f"{denoising(report):.2f}")]
    if "serial" in report and processes > 1:
        rows.append(("times as fast as serial", f"{report['serial']['seconds'] / denoising(report):.2f}"))
    by = f"{processes} ranks" if processes > 1 else "one process"
    by = f"{ranks} ranks, played by one process" if processes < ranks else by
    rows += [("steps", len(report["steps"])), ("evaluated by", by)]
    if report["settings"]["strategy"] == "paper":
        rows.append(("tau1, tau2", f"{switch.tau1}, {switch.tau2}" if switch else "never switched"))
    return [*rows, ("bytes sent", f"{report['bytes_sent']['total']:,}"), ("seed", report["seed"])]


def make_page(report: dict, request: Request, result: Result, serial: Tensor | None = None) -> str:
    """The page as text, from the report and the image; `serial`, (H, W, 3) uint8, is the same prompt's picture by serial."""
    from jinja2 import Environment, StrictUndefined  # here, since most runs write no page

    settings = report["settings"]
    compared = None
    if serial is not None:
        equal, decibels, seconds = (report["serial"][key] for key in ("equal", "psnr", "seconds"))
        distance = "the same pixels" if equal else f"PSNR {decibels:.1f} dB (higher is closer)"
        compared = {"image": data_uri(serial), "seconds": seconds, "distance": distance}
    rows = {**settings, **report["versions"]}.items()
    layout = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = Environment(autoescape=True, undefined=StrictUndefined, **layout)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        prompt=settings["prompt"],
        strategy=settings["strategy"],
        image=data_uri(result.image),
        seconds=denoising(report),
        serial=compared,
        exact=report["exact"]["words"],
        use=in_use(report["use"]),
        facts=facts(report, result.switch),
        only_stage=only_stage(settings["strategy"]),
        stages=stages(report),
        curve=curve(report, request, result.switch),
        rule=request.rule,
        ranks=len(report["ranks"]),
        one_process=settings["ranks"] < len(report["ranks"]),
        timeline=timeline(report, result),
        sent=bytes_rows(report["bytes_sent"]),
        memory=memory_table(report["memory"]),
        phases=phases_table(report),
        settings=[[name, "" if value is None else value] for name, value in rows],
    )


def save_page(page: str, folder: Path, overwrite: bool = True) -> None:
    """Write folder/report.html."""
    write_whole(
        folder / "report.html",
        lambda temporary: temporary.write_text(page, encoding="utf-8", errors="backslashreplace"),
        overwrite,
    )
