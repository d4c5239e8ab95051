"""`exact` gives the same pixels on one process, on two ranks, and again: `python benchmarks/quality/same_pictures.py --count 100`.

Random settings, on the demo checkpoints. Two ranks are started once and make all the pictures; this process makes each of them too, then once more.
Compared are the bytes of the PNGs' pixels. `--unlike` starts the second rank with other arithmetic (--threads 2), where pixels may differ, but
neither the stages nor the end of the run.
"""

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
from pathlib import Path

import torch
import torch.multiprocessing as mp
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

from benchmarks.common import in_words, machine  # noqa: E402
from hybridiff.app.files import save_picture  # noqa: E402
from hybridiff.app.report.record import settings_of  # noqa: E402
from hybridiff.distributed.transport import LocalTransport, Transport, connect, disconnect  # noqa: E402
from hybridiff.pipeline import generate, plan_picture  # noqa: E402
from hybridiff.presets import paper_rule, usual_reuse  # noqa: E402
from hybridiff.request import Request  # noqa: E402
from hybridiff.samplers import SAMPLERS  # noqa: E402
from models import family_of  # noqa: E402
from tests.tiny import free_port  # noqa: E402
from weights.load import open_checkpoint  # noqa: E402

PROMPTS = [
    "a red circle",
    "",
    "a small green star above a large purple ring on a white background",
    "🟥" * 50,
    "\x1b[31m",
]
CPU = torch.device("cpu")


def draw(rng: random.Random, strategy: str = "condition") -> tuple[str, Request]:
    """A family and a request: small, so that it takes a second."""
    family, steps = rng.choice(["sdxl", "sd3"]), rng.randrange(1, 7)
    return family, Request(
        prompt=rng.choice(PROMPTS), negative_prompt=rng.choice([None, "", "blue"]), steps=steps, guidance=round(rng.uniform(1.1, 15), 2),
        height=8 * 2 * rng.randrange(1, 11), width=8 * 2 * rng.randrange(1, 11), seed=rng.randrange(2**63), sampler=rng.choice(list(SAMPLERS[family_of(family).prediction])),
        strategy=strategy, rule=paper_rule(family_of(family).switch, steps), dtype=torch.float32, reuse=usual_reuse(steps, 0.2), tiles=rng.random() < 0.2,
    )  # fmt: skip


def make(requests: list[tuple[str, Request]], transport: Transport, folder: Path) -> list[dict]:
    """Every picture by this process or rank: the hash of its PNG's pixels (rank 0), and the stages."""
    checkpoints, made = {family: open_checkpoint(f"demo-{family}") for family in ("sdxl", "sd3")}, []
    for family, request in requests:
        result = generate(
            checkpoints[family], plan_picture(checkpoints[family], request, transport.world), transport, CPU
        )
        pixels = None
        if result.image is not None:
            save_picture(
                result.image, folder / "p.png", request.seed, settings_of(request, family, transport.world)
            )
            pixels = hashlib.sha256(Image.open(folder / "p.png").tobytes()).hexdigest()
        made.append(
            {
                "pixels": pixels,
                "stages": [record.stage for record in result.records],
                "discrepancies": [r.discrepancy for r in result.records],
            }
        )
    return made


def on_rank(rank: int, port: int, requests: list[tuple[str, Request]], folder: str, unlike: str) -> None:
    """Body of a spawned rank. `unlike`: "threads" or "bf16" is what the second rank's arithmetic differs in, "" for nothing."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(2 if rank and unlike == "threads" else 1)
    if rank and unlike == "bf16":
        rounded = torch.nn.functional.linear
        torch.nn.functional.linear = lambda x, *rest: rounded(
            x.bfloat16().to(x.dtype), *rest
        )  # as matmuls in bf16 see their input
    transport = connect()
    transport.open_channels(CPU)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(make(requests, transport, Path(folder))))
    disconnect()


def on_two_ranks(requests: list[tuple[str, Request]], unlike: str = "") -> list[list[dict]]:
    """What each of two ranks made of all requests."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(on_rank, (free_port(1), requests, folder, unlike), nprocs=2)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(2)]


def in_one_process(requests: list[tuple[str, Request]]) -> list[dict]:
    """The same in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return make(requests, LocalTransport(), Path(folder))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    requests = [draw(rng) for _ in range(args.count)]
    ranks, one, again = on_two_ranks(requests)[0], in_one_process(requests), in_one_process(requests)
    wrong = [
        request
        for (_, request), *made in zip(requests, ranks, one, again)
        if len({told["pixels"] for told in made}) > 1
    ]
    print(
        in_words(
            machine() | {"settings": len(requests), "two ranks, one process and again differ in": len(wrong)}
        )
    )
    for request in wrong:
        print(request)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
