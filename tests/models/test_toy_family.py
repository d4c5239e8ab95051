"""A model that is neither a U-Net nor an MMDiT goes the whole way: the definition of "base for porting".

`tests/toy.py` has the network, its config and the family; nothing else in the project knows of it.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from models.autoencoder import Autoencoder, AutoencoderConfig
from models.clip import CLIPConfig, CLIPText
from tests.small import CLIP, DEMO
from tests.toy import FAMILY, Toy, ToyConfig
from weights.load import WeightsError, open_checkpoint

SIZES = {
    "denoiser": (Toy, ToyConfig(channels=6, width=16, blocks=6, text_width=64)),
    "vae": (Autoencoder, AutoencoderConfig(channels=32, multipliers=(1, 2), blocks=1, latent_channels=6)),
    "clip_l": (CLIPText, CLIPConfig(width=64, heads=1, activation="gelu", **CLIP)),
}
SCRIPT = Path(__file__).parent.parent / "toy.py"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single file with random tensors, CLIP's vocabulary beside it."""
    folder, tensors = tmp_path_factory.mktemp("toy"), {}
    torch.manual_seed(0)
    for name, (network, config) in SIZES.items():
        for key, tensor in network(config).state_dict().items():
            tensors[FAMILY.parts[name].prefix + key] = tensor.half().contiguous()
    save_file(tensors, folder / "toy.safetensors")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(DEMO / name, folder)
    return folder / "toy.safetensors"


def toy(*options: object, ranks: int = 1) -> subprocess.CompletedProcess:
    """The command line with the family in its list, on so many ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    launch = [sys.executable, *(torchrun if ranks > 1 else []), str(SCRIPT), *map(str, options)]
    return subprocess.run(launch, capture_output=True, text=True, timeout=300)


def latents(folder: Path, weights: Path, *options: object, ranks: int = 1) -> torch.Tensor:
    """The last latents of a picture."""
    file, picture = (
        folder / f"{ranks}-{len(list(folder.iterdir()))}.safetensors",
        folder / f"{len(list(folder.iterdir()))}.png",
    )
    given = [
        "--weights",
        weights,
        "--prompt",
        "a red circle",
        "--seed",
        3,
        "--out",
        picture,
        "--save-latents",
        file,
    ]
    ran = toy(*given, *options, ranks=ranks)
    assert ran.returncode == 0 and picture.exists(), ran.stderr
    return load_file(file)["latents"]


def test_check_and_explain(weights: Path):
    ran = toy("--weights", weights, "--check")
    assert ran.returncode == 0 and "Toy, official single file" in ran.stdout, ran.stderr
    assert "row of convolutions" in ran.stdout and "Nothing is missing" in ran.stdout
    ran = toy("--weights", weights, "--explain", "--strategy", "paper", "--steps", 20)
    assert ran.returncode == 0 and "0-2 50%, 3-5 50%" in ran.stdout and "step 4, parallelism" in ran.stdout, (
        ran.stdout
    )
    ran = toy("--weights", weights, "--strategy", "inner-reuse", "--explain")
    assert ran.returncode == 2 and "inner-reuse" in ran.stderr and "Traceback" not in ran.stderr


def test_condition_equals_serial(weights: Path, tmp_path: Path):
    """`equal`: the last latents of two ranks and of one process."""
    two = latents(tmp_path, weights, "--preset", "exact", "--steps", 8, ranks=2)
    assert two.shape == (1, 6, 32, 24)
    assert torch.equal(two, latents(tmp_path, weights, "--strategy", "serial", "--steps", 8))


def test_paper_equals_one_process(weights: Path, tmp_path: Path):
    """`equal`: the last latents of two ranks and of one process that plays both, with five pipelined steps."""
    report = tmp_path / "report"
    options = ["--preset", "paper", "--steps", 20, "--report"]
    two = latents(tmp_path, weights, *options, report, ranks=2)
    assert torch.equal(two, latents(tmp_path, weights, *options, tmp_path / "alone"))
    stages = [step["stage"] for step in json.loads((report / "report.json").read_text())["steps"]]
    assert stages.count("parallelism") == 5


def test_the_default_equals_serial_before_the_first_skipped_step(weights: Path, tmp_path: Path):
    """`equal` up to there, by the report's words; different in the end."""
    two = latents(tmp_path, weights, "--steps", 20, "--report", tmp_path / "report", ranks=2)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    stages = [step["stage"] for step in report["steps"]]
    assert "skipping" in stages and report["exact"]["steps"] == stages.index("skipping") > 0
    assert not torch.equal(two, latents(tmp_path, weights, "--strategy", "serial", "--steps", 20))


def test_a_file_that_lacks_a_tensor_is_refused_by_name(weights: Path, tmp_path: Path):
    tensors = load_file(weights)
    del tensors["toy.blocks.3.bias"]
    save_file(tensors, tmp_path / "cut.safetensors")
    ran = toy("--weights", tmp_path / "cut.safetensors", "--check")
    assert ran.returncode == 2 and "blocks.3.bias" in ran.stderr and "denoiser" in ran.stderr


def test_without_its_line_in_the_list_the_family_is_unknown(weights: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(WeightsError, match="it has no denoiser"):
        open_checkpoint(str(weights))
    monkeypatch.setattr(models, "FAMILIES", [*models.FAMILIES, FAMILY])
    assert open_checkpoint(str(weights)).family == "toy"
