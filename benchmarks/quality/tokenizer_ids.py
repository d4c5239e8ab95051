"""Compares the ids of every tokenizer here with transformers' on seeded strings: `python benchmarks/quality/tokenizer_ids.py`.

Vocabularies: CLIP's own, the demo's CLIP and T5, and T5's where --t5 names a spiece.model. Exit status 1 if any differ.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from models.tokenizers import CLIPTokenizer, T5Tokenizer  # noqa: E402
from tests.models.test_tokenizers import differing, strings, t5_oracle, write_clip  # noqa: E402
from weights.find import DEMO_FOLDER  # noqa: E402
from weights.tokenizers import T5_EXTRA, packed_clip  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=10000, help="strings for each vocabulary")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--t5", type=Path, metavar="FILE", help="another spiece.model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    texts, status = list(strings(args.count, args.seed)), 0
    clip = transformers.CLIPTokenizerFast.from_pretrained
    with tempfile.TemporaryDirectory() as folder:
        pairs = {
            "CLIP": (CLIPTokenizer(*packed_clip()), clip(write_clip(Path(folder)))),
            "demo CLIP": (
                CLIPTokenizer.from_files(DEMO_FOLDER / "vocab.json", DEMO_FOLDER / "merges.txt"), clip(DEMO_FOLDER)
            ),
        }  # fmt: skip
    for file in [DEMO_FOLDER / "spiece.model"] + ([args.t5] if args.t5 else []):
        pairs[f"T5 {file.parent.name}"] = (
            T5Tokenizer(file, 256, extra_ids=T5_EXTRA),
            t5_oracle(file, T5_EXTRA),
        )
    print(f"transformers {transformers.__version__}, {len(texts):,} strings, seed {args.seed}, one thread")
    for name, (ours, theirs) in pairs.items():
        start = time.perf_counter()
        wrong = differing(ours, theirs, texts)
        print(f"{name}: {len(wrong)} differ ({time.perf_counter() - start:.1f} s)")
        for text in wrong[:5]:
            print(f"  {text[:200]}")
        status |= bool(wrong)
    return status


if __name__ == "__main__":
    sys.exit(main())
