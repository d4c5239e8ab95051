"""The report's page: what it says, that nothing in it can run or be fetched, and that a browser opens it."""

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

import train_free_sample
from hybridiff.app.report.charts import nice, slope_chart
from hybridiff.app.report.page import full_step_words, psnr
from hybridiff.strategies import STRATEGIES
from hybridiff.switching import SwitchRule

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
PROMPT = "<script>document.title='owned'</script> \"a\" & 'b' <img src=http://localhost/x> {{ 6 * 7 }}"
SIZES = {"desk": 1200, "phone": 360}


class Page(HTMLParser):
    """Collects the tags, their attributes and the text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.said = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.said += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A report of `paper`, played by one process, beside serial; the cap decides."""
    folder = tmp_path_factory.mktemp("report")
    options = [
        "--preset",
        "paper",
        "--steps",
        "10",
        "--window",
        "3",
        "--slope",
        "1e-9",
        "--cap",
        "4",
        "--interval",
        "2",
        "--seed",
        "3",
    ]
    options += [
        "--prompt",
        PROMPT,
        "--compare-serial",
        "--out",
        str(folder / "p.png"),
        "--report",
        str(folder),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_free_sample.py", *options])
        assert train_free_sample.main() == 0
    return folder


def test_page_holds_what_the_report_holds(folder):
    report = json.loads((folder / "report.json").read_text())
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert sorted(path.name for path in folder.iterdir()) == ["p.png", "report.html", "report.json"]
    assert (
        PROMPT in page.said and "tau1 = 4" in page.said and f"{report['bytes_sent']['total']:,}" in page.said
    )
    assert f"PSNR {report['serial']['psnr']:.1f} dB" in page.said and not report["serial"]["equal"]
    assert all(str(value) in page.said for value in report["settings"].values() if value is not None)
    assert "These are pipelined steps:" in page.said and "branches lie apart" not in page.said
    assert len(report["ranks"]) == 2
    runs = [a for tag, a in page.tags if tag == "rect" and a.get("class") == "run"]
    assert len(runs) > 2 * 10  # two ranks, ten steps, and the steps around the switch once more
    dots = [a for tag, a in page.tags if tag == "circle" and a.get("class") == "dot"]
    assert (
        page.said.count("cap") >= 2
        and len([a for tag, a in page.tags if tag == "line" and a.get("class") == "rule"]) == 2
    )  # in both charts
    assert len(dots) >= sum(step["discrepancy"] is not None for step in report["steps"])


@pytest.mark.parametrize("falls", [[None, 0.25, -0.5], [None, None, None], [None, 0.0, 0.0]])
def test_slope_chart_without_a_band(falls):
    """--slope 0: only the cap switches."""
    drawn = slope_chart(falls, ["warm-up"] * 3, SwitchRule(window=2, slope=0.0, cap=2, interval=1), None)
    assert drawn.count("<circle") == sum(fall is not None for fall in falls) and "nan" not in drawn


def test_page_needs_nothing_from_outside(folder):
    """No scripts, no links, no sources but data URIs; the prompt is text."""
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    assert [a["src"][:22] for _, a in page.tags if "src" in a] == ["data:image/png;base64,"] * 2
    assert not any(name.startswith("on") or name == "href" for _, a in page.tags for name in a)
    assert "url(" not in text and "@import" not in text


def test_times_add_up(folder):
    """The measured operations of a step fill no more than the step, and computing takes time in every step."""
    report = json.loads((folder / "report.json").read_text())
    for i, step in enumerate(report["steps"]):
        spent = sum(sum(rank[i].values()) for rank in report["ranks"])
        assert 0 < spent <= step["seconds"] and all(
            rank[i]["compute"] > 0 for rank in report["ranks"] if step["stage"] == "warm-up"
        )


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here (apt-get install chromium)")
@pytest.mark.parametrize("size", SIZES)
def test_a_browser_opens_it(folder, size, tmp_path):
    """Headless Chromium lays it out: text and charts are there, the prompt did not run, the picture is drawn, nothing is cut off.

    Chromium's windows are never narrower than about 500 pixels, so the page is shown in a frame.
    """
    profile = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    launch = [BROWSER, *profile, "--window-size=1200,2400"]
    page = (folder / "report.html").as_uri()
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<body style="margin: 0"><iframe src="{page}" width="{SIZES[size]}" height="2400" style="border: 0"></iframe>'
    )
    ran = subprocess.run([*launch, "--dump-dom", page], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert (
        ran.stdout.count("<svg") == 4
        and "<title>&lt;script&gt;" in ran.stdout
        and ran.stdout.count('src="data:') == 2
    )
    shot = tmp_path / "shot.png"
    ran = subprocess.run(
        [*launch, f"--screenshot={shot}", frame.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    seen = Image.open(shot).convert("RGB").crop((0, 0, SIZES[size], 2400))
    colours = {colour for _, colour in seen.getcolors(2**24)}
    assert len(colours) > 500  # a picture and charts, not an empty page
    margin = seen.crop((seen.width - 6, 0, seen.width, seen.height))
    assert len(margin.getcolors()) == 1  # nothing runs over the right edge


def test_words_for_more_ranks():
    """Two, four that share a network, four of which two wait."""
    two, shared, idle = (
        full_step_words({"ranks": [[]] * ranks, "bytes_sent": {"by_operation": sent}})
        for ranks, sent in ((2, {}), (4, {"keys": 1}), (4, {}))
    )
    assert (
        "whole network, one with" in two
        and "its share" in shared
        and "but for rounding" in shared
        and "the others wait" in idle
        and "rounding" not in idle
    )


def test_serial_needs_a_report(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_free_sample.py", "--compare-serial"])
    assert train_free_sample.main() == 2
    assert re.fullmatch(r"train_free_sample.py: --compare-serial .*\n", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_has_a_page(strategy, monkeypatch, tmp_path):
    """Also with one step, where there is no slope and no switch."""
    options = [
        "--steps",
        "1",
        "--strategy",
        strategy,
        "--seed",
        "1",
        "--out",
        str(tmp_path / "p.png"),
        "--report",
        str(tmp_path),
    ]
    options += ["--guidance", "1"] if strategy == "one-branch" else []
    monkeypatch.setattr(sys, "argv", ["train_free_sample.py", *options])
    assert train_free_sample.main() == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ("never switched" in page) == (strategy == "paper")


def test_psnr_and_scales():
    """Against the formula in numbers; equal images have none."""
    black = torch.zeros(4, 4, 3, dtype=torch.uint8)
    assert psnr(black, black) is None
    assert psnr(black + 5, black) == pytest.approx(20 * math.log10(255 / 5))
    assert nice(0.21) == pytest.approx([0.05, 0.1, 0.15, 0.2]) and nice(7.0) == pytest.approx([2, 4, 6])
