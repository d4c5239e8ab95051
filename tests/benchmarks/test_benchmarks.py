"""The benchmark scripts on small networks: they run, resume, and their bytes are those that the transport counts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.common import FAMILIES, row_plan
from benchmarks.speed import LINKS, by_medians, plans_of, predict
from hybridiff.cost import total_bytes
from hybridiff.denoise import denoise
from hybridiff.distributed.transport import LocalTransport
from hybridiff.schedule import prediction
from tests.full_size import make_task

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


def script(name: str, *options: object) -> subprocess.CompletedProcess:
    """What a benchmark said."""
    command = [sys.executable, BENCHMARKS / name, *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def dtype_of(kept: dict) -> torch.dtype:
    """What `speed.py` chose for this CPU, as its file tells."""
    return getattr(torch, kept["conditions"]["dtype"].split()[0])


def test_bytes_are_those_the_transport_counts(tmp_path):
    """`equal`, by kind: the script's figures from shapes alone, and a run in one process with weights."""
    ran = script("bytes.py", "--tiny", "--size", 64, "--steps", 12, "--json", tmp_path / "bytes.json")
    assert ran.returncode == 0 and "| sd3 | paper-5 |" in ran.stdout, ran.stderr
    results = json.loads((tmp_path / "bytes.json").read_text())["results"]
    for family in FAMILIES:
        task = make_task(family, 64, 12, torch.float16, True, "cpu")
        for row in ("condition", "paper-5"):
            transport = LocalTransport()
            list(denoise(task, *row_plan(family, row, 12, tiny=True), transport))
            counted = transport.flush()
            assert (
                results[family][row]["by kind"] == dict(counted)
                and results[family][row]["bytes"] == counted.total()
            )


@pytest.mark.parametrize(
    "family, rows",
    [
        ("sdxl", ["condition", "guided-pipeline-4", "fewer-6"]),
        ("sd3", ["batched", "diffusers", "inner-reuse-2", "paper-6"]),
    ],
)
def test_speed_runs_resumes_and_counts_bytes(tmp_path, family, rows):
    """Bytes `equal` by kind to the schedule's; a second run measures nothing; diffusers' network `close` to ours in bf16."""
    options = (
        "speed.py",
        "--tiny",
        "--family",
        family,
        "--size",
        64,
        "--steps",
        16,
        "--part-sizes",
        "--repeats",
        1,
    )
    options = *options, "--json", tmp_path / "speed.json", "--rows"
    ran = script(*options, *rows[:-1])
    assert ran.returncode == 0, ran.stderr
    before = json.loads((tmp_path / "speed.json").read_text())["results"]
    assert set(before) == {f"{family} 64 parts", *(f"{family} 64 16 steps {row}" for row in rows[:-1])}
    ran = script(*options, *rows)
    assert ran.returncode == 0 and f"| {rows[-1]} | 2 |" in ran.stdout, ran.stderr
    kept = json.loads((tmp_path / "speed.json").read_text())
    results, dtype = kept["results"], dtype_of(kept)
    assert {key: results[key] for key in before} == before
    for row in rows:
        result, task = results[f"{family} 64 16 steps {row}"], make_task(family, 64, 16, dtype, True)
        plans, _ = plans_of(family, row, result["steps"], tiny=True)
        assert result["bytes"] == dict(total_bytes(plans, task))
        assert [len(seconds) for seconds in result["seconds of each step"]] == [result["steps"]] * result[
            "ranks"
        ]
        assert result.get("distance from our prediction", 0.0) < 0.02
    ran = script(*options[:-3], "--repeats", 2, "--json", tmp_path / "speed.json")
    assert ran.returncode == 2 and "other conditions" in ran.stderr and "Traceback" not in ran.stderr


def test_some_steps_stand_for_all_where_they_are_alike(tmp_path):
    """`condition` runs two of nine steps and multiplies; `paper`, whose steps differ, runs whole; bytes `equal` to the schedule's."""
    options = (
        "--tiny",
        "--family",
        "sdxl",
        "--size",
        64,
        "--steps",
        9,
        "--part-sizes",
        "--repeats",
        1,
        "--alike",
        2,
    )
    ran = script("speed.py", *options, "--json", tmp_path / "speed.json", "--rows", "condition", "paper-5")
    assert ran.returncode == 0 and "| condition | 2 | 9, of 2 measured |" in ran.stdout, ran.stderr
    kept = json.loads((tmp_path / "speed.json").read_text())
    results, dtype = kept["results"], dtype_of(kept)
    for row, run in (("condition", 2), ("paper-5", 9)):
        result = results[f"sdxl 64 9 steps {row}"]
        assert [len(seconds) for seconds in result["seconds of each step"]] == [run] * 2
        assert result["total"] >= 9 / run * sum(result["seconds of each step"][0])
        plans, _ = plans_of("sdxl", row, 9, tiny=True)
        assert result["bytes"] == dict(total_bytes(plans, make_task("sdxl", 64, 9, dtype, True)))


def test_medians_are_taken_within_equal_steps():
    """By hand: four equal steps of median 2.5, and one of another kind."""
    plans = plans_of("sdxl", "condition", 2)[0] * 2 + plans_of("sdxl", "serial", 1)[0]
    assert by_medians([1.0, 2.0, 9.0, 3.0, 5.0], plans) == 4 * 2.5 + 5.0


def test_prediction_adds_up():
    """By hand: two evaluations a step in one rank, or one and the exchange of a prediction; a slower link costs more."""
    parts = {"entry": 0.2, "inner": 0.4, "exit": 0.4, "whole": 1.0, "whole, batch 2": 1.5}
    predicted = predict("sdxl", 64, 50, parts, tiny=True)
    size = make_task("sdxl", 64, 50, torch.float16, True).size(prediction("cond"))
    for link, (bandwidth, latency) in LINKS.items():
        assert predicted["serial"][link] == 100 and predicted["batched"][link] == 75
        assert predicted["condition"][link] == pytest.approx(50 * (1 + latency + size / bandwidth))
    fast, slow = predicted["paper-30"].values()
    assert fast < slow < predicted["condition"][list(LINKS)[1]]


def test_older_part_times_of_sd3_count_too():
    """`equal`: files that time what is before the first block as "entry", and those where it is in "inner"."""
    parts = {"inner": 0.75, "exit": 0.5, "whole": 1.0, "whole, batch 2": 1.5}
    older = parts | {"entry": 0.25, "inner": 0.5}
    assert predict("sd3", 64, 50, parts, tiny=True) == predict("sd3", 64, 50, older, tiny=True)


def test_graphs_shows_what_was_measured():
    """The table of docs/method.md from the kept file; without a GPU the script refuses."""
    ran = script("timing/graphs.py", "--show", "--json", BENCHMARKS / "results" / "graphs-h200-fp16.json")
    assert ran.returncode == 0 and ran.stdout.count("equal") == 4 and "NOT EQUAL" not in ran.stdout, (
        ran.stderr
    )
    assert "| whole | 45.124 | 26.472 |" in ran.stdout
    if not torch.cuda.is_available():
        refused = script("timing/graphs.py")
        assert refused.returncode == 2 and "there is no CUDA device here" in refused.stderr
