"""How well a demo checkpoint follows prompts: `python benchmarks/scenes.py --family sd3 --prompts 256`.

Makes a picture of each prompt (serial, 50 steps, the checkpoint's guidance) and has `weights/demo/checker.py` look at it:
background, number of objects, colour, shape, size, relation, everything at once. Prints a table with the conditions. The scenes are drawn
anew, but what little there is to say of one object is mostly said in training too, so the captions that are new count by themselves as well.
The checker itself is measured first, on rendered scenes and on the same scenes with another scene's caption.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hybridiff  # noqa: E402
from weights.demo.checker import compare, percent, shares  # noqa: E402
from weights.demo.scenes import render, sample  # noqa: E402
from weights.demo.text_encoders import said  # noqa: E402
from weights.demo.train_vae import LATENTS, save_sheet  # noqa: E402
from weights.load import open_checkpoint  # noqa: E402


def checker_shares(drawn: list) -> tuple[dict[str, float], dict[str, float]]:
    """The checker on rendered ground truth, and with every scene's picture given to the next caption."""
    pictures = [render(scene) for scene, _ in drawn]
    true = [compare(*pair, picture) for pair, picture in zip(drawn, pictures)]
    shuffled = [compare(*pair, picture) for pair, picture in zip(drawn[1:] + drawn[:1], pictures)]
    return shares(true), shares(shuffled)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--family", choices=("sdxl", "sd3"), required=True)
    parser.add_argument("--weights", help="another checkpoint than the family's demo")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0, help="chooses the prompts and the noise")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, help="default: the checkpoint's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument(
        "--sheet", type=Path, metavar="PNG", help="also write the first 64 pictures side by side"
    )
    args = parser.parse_args()
    if args.prompts < (8 if args.sheet else 1):
        parser.error(f"--prompts {args.prompts} are too few: give at least {8 if args.sheet else 1}.")
    torch.set_num_threads(args.threads)
    checkpoint = open_checkpoint(args.weights or f"demo-{args.family}")
    if checkpoint.family != args.family:
        parser.error(
            f"--weights {args.weights} is of family {checkpoint.family}: give --family {checkpoint.family}."
        )
    guidance = (
        checkpoint.defaults.get("guidance", checkpoint.model.guidance)
        if args.guidance is None
        else args.guidance
    )
    trained = {said("train", index) for index in range(LATENTS)}
    drawn = [sample(f"prompts of {args.seed}", index) for index in range(args.prompts)]
    true, shuffled = checker_shares(drawn)

    verdicts, pictures, started = [], [], time.monotonic()
    for index, (scene, caption) in enumerate(drawn):
        made = hybridiff.sample(
            checkpoint,
            caption,
            strategy="serial",
            steps=args.steps,
            guidance=guidance,
            height=128,
            width=128,
            seed=args.seed * 100000 + index,
            dtype="float32",
            device="cpu",
        )
        image = made.image.permute(2, 0, 1) / 127.5 - 1
        verdicts.append(compare(scene, caption, image))
        pictures.append(image)
        if (index + 1) % 16 == 0:
            print(
                f"{index + 1}/{args.prompts} pictures, {time.monotonic() - started:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    new = [caption not in trained for _, caption in drawn]
    found, found_new = shares(verdicts), shares([verdict for verdict, is_new in zip(verdicts, new) if is_new])
    print(
        f"{args.weights or f'demo-{args.family}'}: {args.prompts} prompts of seed {args.seed}, {sum(new)} of them not in training, serial, "
        f"{args.steps} steps, guidance {guidance}, fp32\n"
    )
    print(
        "| right | pictures | of new captions | checker on rendered scenes | on shuffled captions |\n| --- | --- | --- | --- | --- |"
    )
    for question in found:
        print(
            f"| {question} | {' | '.join(percent(column[question]) for column in (found, found_new, true, shuffled))} |"
        )
    if args.json:
        conditions = {key: value for key, value in vars(args).items() if key not in ("json", "sheet")}
        each = [
            {"caption": caption, "new": is_new, **verdict}
            for (_, caption), is_new, verdict in zip(drawn, new, verdicts)
        ]
        told = {"conditions": conditions | {"guidance": guidance}, "right": found, "right of new captions": found_new, "checker": true,
                "shuffled": shuffled}  # fmt: skip
        rows = ",\n  ".join(json.dumps(picture) for picture in each)  # a line each
        args.json.write_text(json.dumps(told, indent=1)[:-2] + f',\n "pictures": [\n  {rows}\n ]\n}}\n')
    if args.sheet:
        shown = pictures[: min(64, len(pictures) // 8 * 8)]
        save_sheet(torch.stack(shown), args.sheet)


if __name__ == "__main__":
    main()
