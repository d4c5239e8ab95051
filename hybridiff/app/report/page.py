"""What happened, as one HTML page for somebody who has just heard of the method: no scripts, nothing from the network."""

import base64
import io
from html import escape
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from hybridiff.app.explain import detail
from hybridiff.app.files import write_whole
from hybridiff.app.report.charts import discrepancy_chart, runs_of, slope_chart, timeline_chart
from hybridiff.app.report.record import in_use
from hybridiff.pipeline import Result
from hybridiff.request import Request
from hybridiff.switching import MIDDLE, Switch

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6576; --paper: #fff; --card: #f5f6f8; --line: #d6dae1;
  --run: #2f6fbd; --send: #c2410c; --wait: #e3a53b; --other: #7a8494; --rule: #b4235a;
  --warm: #f7d58a55; --pipe: #7fd1b455; --full: #a9c3f055; --band: #b4235a26; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #a3adbd; --paper: #14181f; --card: #1d232d; --line: #3a4352;
  --run: #6aa5ea; --send: #f08a4b; --wait: #d9a441; --other: #8b95a6; --rule: #f07aa6;
  --warm: #f7d58a3c; --pipe: #7fd1b44d; --full: #a9c3f03c; --band: #f07aa633; } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 54rem; font: 16px/1.55 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); overflow-wrap: break-word }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .2rem 0 .6rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }
p { margin: .5rem 0 } .soft, figcaption, summary { color: var(--soft); font-size: .92rem }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0 }
figure { margin: 0; flex: 1 1 15rem; max-width: 32rem } figure img { width: 100%; height: auto; border-radius: 6px; display: block }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .6rem; margin: 1rem 0 }
.facts div { background: var(--card); border-radius: 6px; padding: .5rem .7rem } .facts b { display: block; font-size: 1.1rem; line-height: 1.3 }
.facts span { color: var(--soft); font-size: .85rem }
table { border-collapse: collapse; width: 100%; font-size: .92rem; margin: .5rem 0 } .wide { overflow-x: auto }
th, td { text-align: left; padding: .25rem .5rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { font-weight: 600 } td { overflow-wrap: anywhere } .number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.chart { display: block; overflow: visible; margin: .6rem 0 } .chart text { font-size: 11px; fill: var(--soft); }
.warm-up { fill: var(--warm); background: var(--warm) } .parallelism, .skipping { fill: var(--pipe); background: var(--pipe) }
.fully-connecting { fill: var(--full); background: var(--full) }
.grid { stroke: var(--line) } .curve { stroke: var(--run); stroke-width: 2 } .dot { fill: var(--run) } .dot.off { fill: var(--other) }
.rule { stroke: var(--rule); stroke-width: 2; stroke-dasharray: 5 3 } .mark { fill: none; stroke: var(--rule); stroke-width: 2 }
.band { fill: var(--band) } .run { fill: var(--run); background: var(--run) } .send { fill: var(--send); background: var(--send) }
.wait { fill: var(--wait); background: var(--wait) } .other { fill: var(--other); background: var(--other) }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .88rem } .key i { display: inline-block; width: .9em; height: .9em;
  border-radius: 2px; margin-right: .35em; vertical-align: -.08em }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # the browser itself refuses anything from outside
MIDDLE_WORDS = {  # of the middle stage, by strategy
    "paper": "From here the two predictions are treated as one. The network itself is cut into as many parts as there are ranks, and each rank evaluates "
    "only its own, on what other ranks made one step earlier. There is one prediction and no guidance: cheaper, and no longer exact.",
    "step-extrapolation": "Some steps, evenly spread, are not computed: their guided prediction is taken from the line through the last two computed ones. "
    "The steps between them are computed in full.",
    "inner-reuse": "In some steps, evenly spread, each rank evaluates only the outer parts of the network; the inner features are continued from the last two "
    "full steps.",
    "guided-pipeline": "One rank evaluates the outer parts of the network, the other the inner part, under one text a step, in turns. The branch whose turn it is not is "
    "continued from its last two predictions, so that guidance stays.",
}
BYTES_WORDS = {
    "prediction": "predictions of the whole network",
    "features": "features between two parts of the network",
    "keys": "keys and values of a rank's tokens",
    "discrepancy": "the measured discrepancy, one number a step",
}


def psnr(image: Tensor, reference: Tensor) -> float | None:
    """Peak signal-to-noise ratio of two (H, W, 3) uint8 images in dB; None where they are equal."""
    error = (image.double() - reference.double()).square().mean().item()
    return 10 * torch.log10(torch.tensor(255.0**2 / error, dtype=torch.float64)).item() if error else None


def table(head: list[str], rows: list[list[object]], numbers: bool = True) -> str:
    """An HTML table; all columns but the first hold numbers, unless told otherwise."""

    def row(cells: list[object], tag: str) -> str:
        kinds = ["", *[' class="number"' if numbers else ""] * (len(cells) - 1)]
        return (
            "<tr>"
            + "".join(f"<{tag}{kind}>{escape(str(cell))}</{tag}>" for kind, cell in zip(kinds, cells))
            + "</tr>"
        )

    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="wide"><table>{row(head, "th") if head else ""}{body}</table></div>'


def key(entries: dict[str, str]) -> str:
    """What the colours mean: class -> words."""
    return (
        '<p class="key">'
        + "".join(f'<span><i class="{cls}"></i>{escape(said)}</span>' for cls, said in entries.items())
        + "</p>"
    )


def picture(image: Tensor, caption: str, alt: str) -> str:
    """A (H, W, 3) uint8 image inside the page."""
    file = io.BytesIO()
    Image.fromarray(image.numpy()).save(file, format="PNG")
    source = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return f'<figure><img src="{source}" alt="{escape(alt)}"><figcaption>{caption}</figcaption></figure>'


def pictures(report: dict, image: Tensor, serial: Tensor | None) -> str:
    """The picture, beside the one made by `serial` if there is one."""
    name, prompt = escape(report["settings"]["strategy"]), report["settings"]["prompt"]
    if serial is None:
        return f'<div class="pictures">{picture(image, f"made by strategy <b>{name}</b>", prompt)}</div>'
    told = report["serial"]
    distance = "the same pixels" if told["equal"] else f"PSNR {told['psnr']:.1f} dB (higher is closer)"
    ours = picture(image, f"made by strategy <b>{name}</b>: {denoising(report):.1f} s of denoising", prompt)
    theirs = picture(
        serial,
        f"made by <b>serial</b>, both branches one after the other: {told['seconds']:.1f} s of denoising",
        prompt,
    )
    return f'<div class="pictures">{ours}{theirs}</div><p><b>Against serial:</b> {distance}.</p>'


def against_serial(report: dict) -> str:
    """One line on a report with a serial picture: how near it is, and how much faster the denoising was."""
    serial, seconds = report["serial"], denoising(report)
    near = "the same pixels" if serial["equal"] else f"PSNR {serial['psnr']:.1f} dB"
    played = len(report["ranks"]) > report["settings"]["ranks"]
    return (
        f"against serial: {near}, {serial['seconds'] / seconds:.2f} times as fast ({seconds:.2f} s of denoising, serial"
        f" {serial['seconds']:.2f} s{'; one process played all ranks in turn' if played else ''})"
    )


def denoising(report: dict) -> float:
    """Seconds of all steps."""
    return sum(step["seconds"] for step in report["steps"])


def span(a: int, b: int) -> str:
    return f"step {a}" if a == b else f"steps {a} to {b}"


def stages_section(report: dict) -> str:
    """The stages in words, with their steps and seconds."""
    pieces = ["<h2>The stages</h2>"]
    if report["settings"]["strategy"] in ("serial", "batched"):
        return (
            pieces[0]
            + "<p>One process evaluates the network with the prompt and without it, in every step. There is only one stage.</p>"
        )
    if report["settings"]["strategy"] == "one-branch":
        return (
            pieces[0]
            + "<p>Without guidance the network is evaluated once a step, with the prompt. There is only one stage.</p>"
        )
    for stage, a, b in runs_of([step["stage"] for step in report["steps"]]):
        spent = sum(step["seconds"] for step in report["steps"][a : b + 1])
        pieces.append(
            f'<p class="key"><span><i class="{stage}"></i><b>{stage}</b>, {span(a, b)}, {spent:.2f} s</span></p>'
        )
        told = {
            "warm-up": full_step_words(report),
            "fully-connecting": "As in the warm-up again, so that guidance can settle the details.",
        }
        pieces.append(f"<p>{told.get(stage) or MIDDLE_WORDS[report['settings']['strategy']]}</p>")
    return "".join(pieces)


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
        + " They swap the two predictions. The result is what one device would compute"
        + (", but for rounding." if divided else ".")
    )


def why(switch: Switch | None, settings: dict) -> str:
    """Why the stage changed, or that it never did."""
    if settings["strategy"] != "paper":
        return "This strategy does not look at the curve; it is only measured, in the steps that evaluate both branches."
    if switch is None:
        return "The switch never came in these steps: all of them were guided."
    if switch.reason == "slope":
        return (
            f"From step {switch.tau1 - settings['window'] + 1} to step {switch.tau1} the curve fell by less than g = {settings['slope']:g} a step on "
            f"average (the dashed line above, the ringed dot below): tau1 = {switch.tau1}, and tau2 = tau1 + {settings['interval']} = {switch.tau2}."
        )
    return (
        f"The slope had not decided before step {switch.tau1}, so the cap did (the upright dashed line): tau1 = {switch.tau1}, and "
        f"tau2 = tau1 + {settings['interval']} = {switch.tau2}."
    )


def curve_section(report: dict, request: Request, switch: Switch | None) -> str:
    """The discrepancy, its average fall, and the rule that looks at it."""
    steps, rule = report["steps"], request.rule
    stages = [step["stage"] for step in steps]
    values, falls = ([step[name] for step in steps] for name in ("discrepancy", "slope"))
    pieces = [
        f"<h2>{'When to switch' if report['settings']['strategy'] == 'paper' else 'How far the branches lie apart'}</h2>",
        "<p>The <i>denoising discrepancy</i> says how far the prediction with the prompt lies from the one without it: "
        "mean|cond - uncond| / mean|uncond|. The paper takes a flat curve as the sign that the two "
        "predictions may be merged for a few steps; in those there is only one prediction, so nothing can be measured.</p>",
        key({stage: stage for stage, _, _ in runs_of(stages)}),
        discrepancy_chart(values, stages, rule, switch),
        f"<p>{why(switch, report['settings'])}</p>",
    ]  # fmt: skip
    if report["settings"]["strategy"] != "paper":
        return "".join(pieces)
    pieces += [
        f'<p class="soft">Below: the average fall a step over the last {rule.window} steps (L). The switch comes where it first lies '
        f"in the band from 0 to g, at step {rule.cap} (the cap) at the latest. Grey dots lie beyond the chart.</p>",
        slope_chart(falls, stages, rule, switch) if any(fall is not None for fall in falls) else
        f"<p>There were not steps enough to look back over {rule.window} of them.</p>",
    ]  # fmt: skip
    return "".join(pieces)


def timeline_section(report: dict, result: Result) -> str:
    """Each rank's measured time: the whole run, the steps around the switch, and sums."""
    stages = [step["stage"] for step in report["steps"]]
    ranks, processes = len(report["ranks"]), report["settings"]["ranks"]
    pieces = ["<h2>What each rank did</h2>", "<p>Measured, not computed. Time runs to the right.</p>"]
    if processes < ranks:
        pieces.append(
            f"<p>One process played all {ranks} ranks in turn, so their work does not overlap here.</p>"
        )
    pieces.append(
        key(
            {
                "run": "computes",
                "send": "posts a message",
                "wait": "waits and receives",
                "other": "guides, measures, steps",
            }
        )
    )
    pieces.append(timeline_chart(result.bars, ranks, stages))
    middle = [step for step, stage in enumerate(stages) if stage in MIDDLE]
    if middle:
        first, last = (min(max(step, 0), len(stages) - 1) for step in detail(middle))
        pieces.append(f'<p class="soft">The same, only {span(first, last)}:</p>')
        pieces.append(
            timeline_chart([bar for bar in result.bars if first <= bar.step <= last], ranks, stages)
        )
    rows = []
    for rank, told in enumerate(report["ranks"]):
        for stage, a, b in runs_of(stages):
            sums = [
                sum(step[name] for step in told[a : b + 1]) for name in ("compute", "send", "wait", "other")
            ]
            rows.append([f"rank {rank}, {stage}", *(f"{seconds:.3f}" for seconds in sums)])
    pieces.append(table(["seconds", "compute", "send", "wait", "other"], rows))
    rows = []
    for i in range(len(report["steps"])):
        for rank, told in enumerate(report["ranks"]):
            rows.append(
                [
                    f"{i}, rank {rank}",
                    *(f"{1000 * told[i][name]:.2f}" for name in ("compute", "send", "wait", "other")),
                ]
            )
    every = table(["step", "compute", "send", "wait", "other"], rows)
    pieces.append(f"<details><summary>Every step, in milliseconds</summary>{every}</details>")
    return "".join(pieces)


def bytes_section(report: dict) -> str:
    """Bytes by what was sent."""
    sent = report["bytes_sent"]
    if not sent["total"]:
        return "<h2>Bytes</h2><p>Nothing was sent: there is one rank.</p>"
    rows = [[BYTES_WORDS.get(kind, kind), f"{count:,}"] for kind, count in sent["by_operation"].items()]
    return "<h2>Bytes sent</h2>" + table(["what", "bytes"], [*rows, ["together", f"{sent['total']:,}"]])


def memory_section(report: dict) -> str:
    """The highest memory of every rank in every phase."""
    ranks = report["memory"]
    head = [
        f"rank {rank}{', GPU' if where == 'gpu' else ''}"
        for rank, told in enumerate(ranks)
        for where in told["peak"]
    ]
    phases = list(dict.fromkeys(phase for told in ranks for phase in told["phases"]))  # rank 0 alone decodes

    def row(name: str, sizes: list[dict]) -> list[str]:
        return [
            name,
            *(
                f"{size[where] / 1e6:,.0f}" if where in size else ""
                for told, size in zip(ranks, sizes)
                for where in told["peak"]
            ),
        ]

    rows = [row(phase, [told["phases"].get(phase, {}) for told in ranks]) for phase in phases]
    rows.append(row("the highest", [told["peak"] for told in ranks]))
    return (
        "<h2>Memory</h2><p>The most that each rank had at once, in MB: memory of the host as the operating system counts it (mapped weight files are in it, also where "
        "ranks share them)"
        + (", and what was allocated on the GPU." if "gpu" in ranks[0]["peak"] else ".")
        + "</p>"
        + table(["phase, MB", *head], rows)
    )


def make_page(report: dict, request: Request, result: Result, serial: Tensor | None = None) -> str:
    """The page as text, from the report and the image; `serial`, (H, W, 3) uint8, is the same prompt's picture by serial."""
    settings, steps = report["settings"], len(report["steps"])
    switch = result.switch
    prompt = escape(settings["prompt"] or "(no prompt)")
    played = settings["ranks"] < len(report["ranks"])
    who = (
        f"{len(report['ranks'])} ranks, played by one process"
        if played
        else f"{settings['ranks']} ranks"
        if settings["ranks"] > 1
        else "one process"
    )
    faster = (
        report["serial"]["seconds"] / denoising(report)
        if serial is not None and settings["ranks"] > 1
        else None
    )
    facts = {
        "seconds of denoising": f"{denoising(report):.2f}",
        **({"times as fast as serial": f"{faster:.2f}"} if faster else {}),
        "steps": steps,
        "evaluated by": who,
        **(
            {"tau1, tau2": f"{switch.tau1}, {switch.tau2}" if switch else "never switched"}
            if settings["strategy"] == "paper"
            else {}
        ),
        "bytes sent": f"{report['bytes_sent']['total']:,}",
        "seed": report["seed"],
    }
    cards = "".join(
        f"<div><span>{name}</span><b>{escape(str(value))}</b></div>" for name, value in facts.items()
    )
    phases = [[phase, *(f"{spent:.2f}" for spent in seconds)] for phase, seconds in report["seconds"].items()]
    processes = (
        [f"rank {rank}" for rank in range(settings["ranks"])] if settings["ranks"] > 1 else ["seconds"]
    )
    plain = [
        [name, "" if value is None else value] for name, value in {**settings, **report["versions"]}.items()
    ]
    body = [
        f"<h1>{prompt}</h1>",
        "<p>A diffusion model begins with noise and takes it away step by step. In every step the network is asked twice, with the prompt and "
        "without it, and the difference is amplified (<i>classifier-free guidance</i>). Two devices can share that work: this page shows how it went.</p>",
        pictures(report, result.image, serial),
        f"<p><b>Exact:</b> {escape(report['exact']['words'])}.</p>",
        *(f"<p>{escape(line[0].upper() + line[1:])}.</p>" for line in in_use(report["use"])),
        f'<div class="facts">{cards}</div>',
        stages_section(report),
        *(
            [curve_section(report, request, switch)]
            if any(step["discrepancy"] is not None for step in report["steps"])
            else []
        ),
        timeline_section(report, result),
        bytes_section(report),
        memory_section(report),
        "<h2>Seconds by phase</h2>" + table(["phase", *processes], phases),
        "<h2>Settings and versions</h2>" + table([], plain, numbers=False),
        '<p class="soft">The method: Jung et al., Accelerating Diffusion via Hybrid Data-Pipeline Parallelism Based on Conditional '
        "Guidance Scheduling, arXiv 2602.21760. The same figures are in report.json beside this page.</p>",
    ]
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{prompt}</title><style>{STYLE}</style>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def save_page(page: str, folder: Path, overwrite: bool = True) -> None:
    """Write folder/report.html."""
    write_whole(
        folder / "report.html",
        lambda temporary: temporary.write_text(page, encoding="utf-8", errors="backslashreplace"),
        overwrite,
    )
