"""Opens thousands of damaged files and counts what came of them: `python benchmarks/hardship/fuzz_files.py --count 2000`.

A file must load, or end in a WeightsError of one short line; an exception of another kind, an answer after more than
--seconds, or memory growing by more than the whole file's size and 50 MB (the allocator's own growth over thousands of
loads is some 15 MB) fails.
"""

import argparse
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests.mutations import MUTATIONS, acceptable, outcome  # noqa: E402
from tests.small import random_states, write_single  # noqa: E402


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    """Runs the fuzz, prints a table; exit status 1 if any file failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000, help="files, half of each family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10.0, help="the longest that one file may take")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, loaded, refused, failures, slowest = random.Random(args.seed), Counter(), Counter(), [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for family in ("sdxl", "sd3"):
            states = random_states(family, torch.float16)
            files[family] = write_single(Path(folder) / f"{family}.safetensors", family, states)
        wholes = [file.read_bytes() for file in files.values()]
        for file in files.values():
            assert outcome(file) == "loaded"
        for mutation in MUTATIONS * 4:  # so that the damaging itself does not count as growth
            for whole in wholes:
                mutation(whole, rng)
        before, path = peak_bytes(), Path(folder) / "damaged.safetensors"
        for i in range(args.count):
            mutation = MUTATIONS[i // 2 % len(MUTATIONS)]
            path.unlink(missing_ok=True)
            path.write_bytes(mutation(wholes[i % 2], rng))
            start = time.perf_counter()
            try:
                result = outcome(path)
            except Exception:  # what the fuzz is looking for
                failures.append(f"{i} {mutation.__name__}: {traceback.format_exc()}")
                continue
            seconds = time.perf_counter() - start
            slowest = max(slowest, seconds)
            (loaded if result == "loaded" else refused)[mutation.__name__] += 1
            if not acceptable(result) or seconds > args.seconds:
                failures.append(f"{i} {mutation.__name__}: {seconds:.1f} s: {ascii(result)}")
        grown, largest = peak_bytes() - before, max(map(len, wholes))
    for mutation in MUTATIONS:
        name = mutation.__name__
        print(f"{name:<14} loaded {loaded[name]:>5}   refused {refused[name]:>5}")
    print(
        f"{args.count} files, {len(failures)} failures, slowest {slowest:.2f} s,"
        f" memory grew by {grown / 1e6:.1f} MB (largest whole file {largest / 1e6:.1f} MB)"
    )
    print("\n".join(failures[:20]))
    return 1 if failures or grown > largest + 50e6 else 0


if __name__ == "__main__":
    sys.exit(main())
