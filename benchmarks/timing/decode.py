"""Decoding by two ranks together against one: `python benchmarks/timing/decode.py`.

The full-size autoencoder's decoder with seeded random weights in fp32, one thread a rank, on smooth random latents: seconds until rank 0 has the
picture, alone and with half of the rows and some of the neighbour's on each rank, and how far the two pictures are apart.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks.common import in_words, machine, table  # noqa: E402
from benchmarks.timing.timed import on_ranks  # noqa: E402
from hybridiff.app.files import write_whole  # noqa: E402
from hybridiff.app.report.page import psnr  # noqa: E402
from hybridiff.distributed.transport import Transport  # noqa: E402
from hybridiff.pipeline import WORTH_SPLITTING, decode  # noqa: E402
from models.autoencoder import Autoencoder, AutoencoderConfig  # noqa: E402
from tests.full_size import FACTOR, SEED, fill  # noqa: E402


def time_both(transport: Transport, sizes: list[int], repeats: int) -> dict[int, dict]:
    """Body of a rank. Size in pixels -> seconds "alone" and "together", medians, and on rank 0 the PSNR of one picture to the other."""
    with torch.device("meta"):
        vae = Autoencoder(AutoencoderConfig())
    vae = vae.eval().requires_grad_(False).to_empty(device="cpu")
    fill(vae)
    checkpoint = SimpleNamespace(load=lambda *part, **how: vae)  # all that `decode` asks of one
    found = {}
    for size in sizes:
        coarse = torch.randn(
            1, vae.config.latent_channels, 6, 6, generator=torch.Generator().manual_seed(SEED)
        )
        latents = F.interpolate(coarse, (size // FACTOR, size // FACTOR), mode="bicubic")
        seconds, images = {"alone": [], "together": []}, {}
        for _ in range(repeats + 1):  # the first does not count
            for way in seconds:
                transport.all_gather(None)
                start = time.perf_counter()
                if way == "together" or transport.rank == 0:
                    images[way] = decode(
                        checkpoint,
                        latents,
                        torch.device("cpu"),
                        transport=transport if way == "together" else None,
                    )
                seconds[way].append(time.perf_counter() - start)
        found[size] = {way: median(times[1:]) for way, times in seconds.items()}
        if transport.rank == 0:
            found[size]["PSNR"] = psnr(images["together"], images["alone"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs="+",
        default=[512, 1024],
        help="pixels a side, from the least that ranks share",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if any(size % FACTOR or size**2 < WORTH_SPLITTING for size in args.size):
        parser.error(
            f"--size: give multiples of {FACTOR} from {WORTH_SPLITTING**0.5:g} on, below which ranks do not share a picture."
        )
    found = on_ranks(2, time_both, args.size, args.repeats)[0]
    conditions = machine() | {"dtype": "float32", "threads a rank": 1, "repeats": args.repeats}
    rows = [
        [size, told["alone"], told["together"], told["alone"] / told["together"], told["PSNR"]]
        for size, told in found.items()
    ]
    print(in_words(conditions))
    print("\n" + table(["pixels a side", "alone, s", "together, s", "times as fast", "PSNR, dB"], rows))
    if args.json:
        text = json.dumps({"conditions": conditions, "results": found}, indent=1) + "\n"
        write_whole(args.json, lambda temporary: temporary.write_text(text))


if __name__ == "__main__":
    main()
