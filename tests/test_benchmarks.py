"""The benchmark scripts on small networks: they run, resume, and their bytes are those that the transport counts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.full_size import FAMILIES, make_task, row_plan
from hybridiff.denoise import denoise
from hybridiff.transport import Mailbox

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def script(name: str, *options: object) -> subprocess.CompletedProcess:
    """What a benchmark said."""
    command = [sys.executable, BENCHMARKS / name, *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_bytes_are_those_the_transport_counts(tmp_path):
    """`equal`, by kind: the script's figures from shapes alone, and a run in one process with weights."""
    ran = script("bytes.py", "--tiny", "--size", 64, "--steps", 12, "--json", tmp_path / "bytes.json")
    assert ran.returncode == 0 and "| sd3 | paper-5 |" in ran.stdout, ran.stderr
    results = json.loads((tmp_path / "bytes.json").read_text())["results"]
    for family in FAMILIES:
        task = make_task(family, 64, 12, torch.float16, True, "cpu")
        for row in ("condition", "paper-5"):
            transport = Mailbox()
            list(denoise(task, *row_plan(family, row, 12), transport))
            assert results[family][row]["by kind"] == dict(transport.finish())
            assert results[family][row]["bytes"] == transport.finish().total()
