"""Charts as SVG text. Across, everything is in percent, so that they fit a phone and a desk without shrinking their letters."""

import math
from collections.abc import Sequence
from html import escape

from hybridiff.app.profile import Bar
from hybridiff.switching import Stage, Switch, SwitchRule


def tag(name: str, text: str = "", **attributes: object) -> str:
    """One SVG element; `cls` stands for class, underscores for hyphens, floats are rounded."""
    written = ""
    for attribute, value in attributes.items():
        key = attribute.replace("cls", "class").replace("_", "-")
        rounded = round(value, 3) if isinstance(value, float) else value
        written += f' {key}="{escape(str(rounded))}"'
    return f"<{name}{written}>{text}</{name}>"


def percent(value: float) -> str:
    return f"{100 * value:.3f}%"


def svg(height: int, title: str, *pieces: str) -> str:
    """A chart of this height in pixels, as wide as there is room, with a title for those who cannot see it."""
    return tag(
        "svg",
        tag("title", escape(title)) + "".join(pieces),
        width="100%",
        height=height,
        role="img",
        cls="chart",
    )


def stretches(stages: Sequence[Stage]) -> list[tuple[Stage, int, int]]:
    """(stage, first step, last step) of each stage, in order."""
    spans: list[tuple[Stage, int, int]] = []
    for step, stage in enumerate(stages):
        if spans and spans[-1][0] == stage:
            spans[-1] = (stage, spans[-1][1], step)
        else:
            spans.append((stage, step, step))
    return spans


def shades(stages: Sequence[Stage], height: int) -> list[str]:
    """A shaded stretch for each stage, steps spread evenly."""
    steps = len(stages)
    return [
        tag(
            "rect",
            x=percent(a / steps),
            y=0,
            width=percent((b + 1 - a) / steps),
            height=height,
            cls=f"shade {stage}",
        )
        for stage, a, b in stretches(stages)
    ]


def step_axis(steps: int, y: int) -> list[str]:
    """Numbers of some steps below a chart."""
    every = max(1, round(steps / 5))
    labelled = range(0, steps, every)
    return [tag("text", str(i), x=percent((i + 0.5) / steps), y=y, text_anchor="middle") for i in labelled]


def nice(top: float) -> list[float]:
    """At most four round values up to `top`, positive, for the lines of a scale."""
    power = 10.0 ** math.floor(math.log10(top))
    unit = next(size * power for size in (0.1, 0.2, 0.5, 1, 2, 5) if top / (size * power) < 5)
    return [unit * n for n in range(1, int(top / unit) + 1)]


def cap_line(switch: Switch, steps: int, height: int) -> list[str]:
    """A line where the cap decided."""
    x = percent(min(switch.tau1, steps) / steps)
    beside = {"dx": -4, "text_anchor": "end"} if switch.tau1 > steps / 2 else {"dx": 4}
    return [tag("line", x1=x, x2=x, y1=0, y2=height, cls="rule"), tag("text", "cap", x=x, y=12, **beside)]


def discrepancy_chart(
    values: Sequence[float | None], stages: Sequence[Stage], rule: SwitchRule, switch: Switch | None
) -> str:
    """The discrepancy of every step that measured it; where the slope decided, the chord over the window that decided, else the cap."""
    height, steps = 200, len(values)
    top = 1.15 * max((v for v in values if v is not None), default=1.0) or 1.0

    def at(step: int) -> tuple[str, float]:
        return percent((step + 0.5) / steps), height * (1 - values[step] / top)

    def line(a: int, b: int, cls: str) -> str:
        (x1, y1), (x2, y2) = at(a), at(b)
        return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, cls=cls)

    pieces = shades(stages, height)
    for value in nice(top):
        y = height * (1 - value / top)
        pieces += [
            tag("line", x1=0, x2="100%", y1=y, y2=y, cls="grid"),
            tag("text", f"{value:g}", x=4, y=y - 3),
        ]
    known = [step for step in range(steps) if values[step] is not None]
    pieces += [line(a, b, "curve") for a, b in zip(known, known[1:]) if b == a + 1]
    pieces += [
        tag("circle", tag("title", f"step {s}: {values[s]:.4f}"), cx=at(s)[0], cy=at(s)[1], r=2.5, cls="dot")
        for s in known
    ]
    if switch and switch.reason == "cap":
        pieces += cap_line(switch, steps, height)
    if switch and switch.reason == "slope":
        older = switch.tau1 - rule.window + 1
        pieces += [line(older, switch.tau1, "rule")]
        pieces += [tag("circle", cx=at(s)[0], cy=at(s)[1], r=5, cls="mark") for s in (older, switch.tau1)]
    return svg(height + 20, "Denoising discrepancy over the steps", *pieces, *step_axis(steps, height + 15))


def slope_chart(
    falls: Sequence[float | None], stages: Sequence[Stage], rule: SwitchRule, switch: Switch | None
) -> str:
    """The average fall a step against the band [0, g) that switches; values beyond the chart are drawn at its edge."""
    height, steps = 130, len(falls)
    # slope 0: there is no band
    scale = rule.slope or max((abs(fall) for fall in falls if fall is not None), default=0.0) / 6 or 1.0
    top, bottom = 6 * scale, -3 * scale

    def down(value: float) -> float:
        return height * (top - min(max(value, bottom), top)) / (top - bottom)

    pieces = shades(stages, height)
    pieces.append(
        tag("rect", x=0, width="100%", y=down(rule.slope), height=down(0.0) - down(rule.slope), cls="band")
    )
    pieces.append(tag("text", f"g = {rule.slope:g}", x=4, y=down(rule.slope) - 3))
    pieces.append(tag("text", "0", x=4, y=down(0.0) + 13))
    if switch and switch.reason == "cap":
        pieces += cap_line(switch, steps, height)
    for step, fall in enumerate(falls):
        if fall is not None:
            decided = switch is not None and switch.reason == "slope" and step == switch.tau1
            mark = (
                {"r": 5, "cls": "mark"}
                if decided
                else {"r": 2.5, "cls": "dot" if bottom <= fall <= top else "dot off"}
            )
            title = tag("title", f"step {step}: {fall:.6f}")
            pieces.append(tag("circle", title, cx=percent((step + 0.5) / steps), cy=down(fall), **mark))
    return svg(height + 20, "Average fall of the discrepancy a step", *pieces, *step_axis(steps, height + 15))


def timeline_chart(bars: Sequence[Bar], ranks: int, stages: Sequence[Stage]) -> str:
    """Every rank's measured operations along the time they took, a row a rank, the stages shaded behind."""
    begin, end = min(bar.start for bar in bars), max(bar.end for bar in bars)
    length = (end - begin) or 1.0
    row, gap = 34, 24
    height = ranks * (row + gap) + 4

    def along(time: float) -> str:
        return percent((time - begin) / length)

    starts = {step: min(bar.start for bar in bars if bar.step == step) for step in {bar.step for bar in bars}}
    pieces = []
    for stage, a, b in stretches(stages):
        inside = [step for step in starts if a <= step <= b]
        if inside:
            left, right = starts[min(inside)], starts.get(max(inside) + 1, end)
            pieces.append(
                tag(
                    "rect",
                    x=along(left),
                    y=0,
                    width=percent((right - left) / length),
                    height=height,
                    cls=f"shade {stage}",
                )
            )
    for rank in range(ranks):
        y = rank * (row + gap) + gap
        pieces.append(tag("text", f"rank {rank}", x=4, y=y - 6))
        for bar in bars:
            if bar.rank == rank and bar.end > bar.start:
                title = tag(
                    "title", f"step {bar.step}: {escape(bar.label)}, {1000 * (bar.end - bar.start):.2f} ms"
                )
                share = percent((bar.end - bar.start) / length)
                pieces.append(
                    tag("rect", title, x=along(bar.start), y=y, width=share, height=row, cls=bar.what)
                )
    ticks = [
        tag("text", f"{begin + length * f:.2f} s", x=percent(f), y=height + 15, text_anchor=a)
        for f, a in ((0, "start"), (0.5, "middle"), (1, "end"))
    ]
    return svg(height + 20, "What each rank did, as measured", *pieces, *ticks)
