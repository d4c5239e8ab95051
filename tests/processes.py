"""The command line in this process, under torchrun, or as ranks that are started one by one."""

import os
import subprocess
import sys
from pathlib import Path

import train_free_sample
from tests.tiny import free_port

SCRIPT = Path(train_free_sample.__file__)


def call(monkeypatch, *options: str) -> int:
    """The script in this process."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    return train_free_sample.main()


def torchrun(*options: str, ranks: int = 2, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """The script on ranks of its own."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run(
        [*launch, str(SCRIPT), *options], capture_output=True, text=True, timeout=300, cwd=cwd
    )


def start(
    options: list[list[str]], folder: Path, script: tuple[str, ...] = (str(SCRIPT),), port: int | None = None
) -> list[subprocess.Popen]:
    """TorchTransport as processes of this one, each with options of its own and its words in folder/said-RANK."""
    each, port = [], port or free_port(1)
    for rank, given in enumerate(options):
        env = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(options)), "MASTER_ADDR": "127.0.0.1",
                            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(len(options))}  # fmt: skip
        with open(folder / f"said-{rank}", "w") as said:
            each.append(
                subprocess.Popen([sys.executable, *script, *given], env=env, stdout=said, stderr=said)
            )
    return each
