"""`--preset exact` at a size at which the ranks of other presets decode together, which rounds."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

import train_free_sample


def test_exact_decodes_alone_so_that_a_large_picture_too_is_the_one_of_one_device(tmp_path, monkeypatch):
    """`equal` pixels at 512 x 512 on two ranks and by `serial`: `condition` is equal, and one rank alone decodes."""
    options = ["--seed", "5", "--steps", "1", "--height", "512", "--width", "512"]
    script, two, one = Path(train_free_sample.__file__), tmp_path / "two.png", tmp_path / "one.png"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, str(script), *options, "--preset", "exact", "--out", str(two)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    arguments = [str(script), *options, "--strategy", "serial", "--out", str(one)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert train_free_sample.main() == 0
    pictures = [Image.open(path) for path in (two, one)]
    assert pictures[0].size == (512, 512)
    assert pictures[0].tobytes() == pictures[1].tobytes()
