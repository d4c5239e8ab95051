"""Trains one of the demo checkpoints from nothing: tokenizers, text encoders, autoencoder, latents, denoiser, export.

    python -m weights.demo.train --family sdxl --out DIR --weights FOLDER
    python -m weights.demo.train --family sd3 --out DIR --weights FOLDER

The checkpoint goes to FOLDER (without `--weights` it replaces the one in the repository), everything on the way (states, latents, sample sheets) to DIR; run the same command again after a kill and it goes
on from the last state. `--export` only writes the checkpoint from the last stage's state, finished or not. `--begin-with FILE` trains
a checkpoint's denoiser on, in the last stage alone, with the checkpoint's text encoders and autoencoder. Beside the new checkpoint lies
demo-FAMILY.training.json: steps, minutes, conditions and the loss of every stage.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from hybridiff.app.files import write_whole
from models.autoencoder import Autoencoder
from weights.demo import tokenizers
from weights.demo.checker import compare, percent, shares
from weights.demo.denoisers import FAMILIES, SD3Demo, SDXLDemo, cells
from weights.demo.export import GUIDANCE, export
from weights.demo.loop import Plan, Run, digest, record
from weights.demo.scenes import sample
from weights.demo.text_encoders import TextEncoders, said, tokens, train_text_encoders
from weights.demo.train_vae import latent_cache, save_sheet, train_autoencoder
from weights.demo.train_vae import psnr as autoencoder_psnr
from weights.load import Checkpoint, WeightsError, open_checkpoint

HERE = Path(__file__).parent
PLANS = {  # the last one's model is exported
    "sdxl": {"denoiser": Plan(steps=20000, batch=32, rate=6e-4)},
    "sd3": {
        "coarse": Plan(steps=6000, batch=16, rate=1e-3, warmup=300, muon=3.0),
        "denoiser": Plan(steps=13900, batch=16, rate=8e-4, muon=3.0),
    },
}


def train_denoiser(
    model: nn.Module, run: Run, autoencoder: Autoencoder, cache: tuple, options: argparse.Namespace
) -> None:
    """Trains to the end of the run's plan; `cache` is what `latent_cache` gives. Every 1,000 steps it makes pictures of 16 unseen
    captions, writes them side by side and prints the share of them that `checker.compare` finds right."""
    cached, scaling, shift = cache
    latents, covered = cached["latents"], cached["covered"]
    device, folder = torch.device(options.device), options.weights
    ids = tokens([said("train", index) for index in range(len(latents))], folder)
    scenes = torch.stack(
        [cells(sample("train", index)[0], model.reading.cells) for index in range(len(latents))]
    )
    empty = tokens([""], folder).to(device)
    unseen = [sample("test", index) for index in range(16)]
    noise = torch.randn(len(unseen), *latents.shape[1:], generator=torch.Generator().manual_seed(0)).to(
        device
    )
    predict = torch.compile(model.reading) if options.compile else model.reading

    def loss_of(generator: torch.Generator, step: int) -> Tensor:
        chosen = torch.randint(len(latents), (run.plan.batch,), generator=generator)
        with run.half_precision():
            return model.loss(
                predict,
                latents[chosen].float().to(device),
                ids[chosen].to(device),
                scenes[chosen].to(device),
                covered[chosen].to(device) / 4,
                empty,
                generator,
            )

    def show() -> None:
        told = tokens([caption for _, caption in unseen], folder).to(device)
        with torch.inference_mode():
            pictures = autoencoder.decode(
                model.sample(told, empty, noise, steps=25, guidance=GUIDANCE[options.family]) / scaling
                + shift
            )
        save_sheet(pictures, run.state_file.with_name(f"{run.state_file.stem}-{run.step:06d}.png"))
        right = shares([compare(*pair, picture) for pair, picture in zip(unseen, pictures.float().cpu())])
        print("right: " + ", ".join(f"{name} {percent(share)}" for name, share in right.items()), flush=True)

    run.fit(loss_of, show, show_every=1000)


def begun(family: str, encoders: TextEncoders, given: Checkpoint) -> nn.Module:
    """The family's model with the denoiser of a checkpoint, ready for the last stage. RuntimeError where it is not a demo's."""
    denoiser = given.load("denoiser", torch.float32)
    coarse = family == "sd3" and denoiser.config.patch == 2
    model = SD3Demo(encoders, denoiser.config.patch) if family == "sd3" else SDXLDemo(encoders)
    model.denoiser.load_state_dict(denoiser.state_dict())
    return model.refined() if coarse else model


def main() -> None:
    """Runs the stages in order; each is skipped where its result is already there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=sorted(FAMILIES), required=True)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for states, latents and sample sheets"
    )
    parser.add_argument(
        "--weights", type=Path, default=HERE, help="folder for the checkpoint and tokenizer files"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads on the CPU")
    parser.add_argument("--vae-steps", type=int, help="instead of the planned number")
    parser.add_argument(
        "--steps", type=int, help="instead of the planned number, for every stage of the denoiser"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile text encoders and denoiser: 1.5x with demo-sd3 on a CPU with a C++ compiler",
    )
    parser.add_argument(
        "--begin-with",
        type=Path,
        metavar="FILE",
        help="a demo checkpoint whose denoiser is trained on, by the last stage alone",
    )
    parser.add_argument(
        "--export", action="store_true", help="write the checkpoint from the last state and stop"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, out, plans = torch.device(options.device), options.out, PLANS[options.family]
    plans = {"denoiser": plans["denoiser"]} if options.begin_with else plans
    before = (
        []
        if options.begin_with
        else [out / "text-encoders.safetensors", out / f"{options.family}-vae.safetensors"]
    )
    states = before + [out / f"{options.family}-{name}.safetensors" for name in plans]
    if options.export and (missing := [state for state in states if not state.exists()]):
        parser.error(f"--export: there is no {missing[0]} yet; train first.")
    if any(plan.muon for plan in plans.values()) and not hasattr(torch.optim, "Muon"):
        parser.error(
            f"--family {options.family} is trained with torch.optim.Muon, which torch {torch.__version__} has not: take 2.9 or newer."
        )
    out.mkdir(parents=True, exist_ok=True)
    if not all((options.weights / name).exists() for name in tokenizers.FILES):
        tokenizers.write_all(options.weights)

    torch.manual_seed(1)
    vocabulary = len(json.loads((options.weights / "vocab.json").read_text()))
    encoders = TextEncoders(vocabulary, tokenizers.t5_size(options.weights / "spiece.model"))
    if options.begin_with:
        try:
            given = open_checkpoint(str(options.begin_with))
            if given.family != options.family:
                parser.error(
                    f"--begin-with {options.begin_with} is of family {given.family}: give one of family {options.family}."
                )
            for name in {"clip_l", "clip_g", "t5"} & {*given.parts}:
                setattr(encoders, name, given.load(name, torch.float32, device))
            encoders.requires_grad_(False)
            autoencoder = given.load("vae", torch.float32, device)
        except WeightsError as problem:
            parser.error(f"--begin-with: {problem}")
        psnr, source = autoencoder_psnr(autoencoder), given.digest()[:16]
    else:
        train_text_encoders(encoders, options.weights, out, device, options.compile)
        autoencoder, psnr = train_autoencoder(options.family, out, device, options.vae_steps)
        source = digest(*before)
    torch.manual_seed(2)
    if not options.begin_with:
        model = FAMILIES[options.family](encoders)
    else:
        try:
            model = begun(options.family, encoders, given)
        except WeightsError as problem:
            parser.error(f"--begin-with: {problem}")
        except RuntimeError:
            parser.error(
                f"--begin-with {options.begin_with} has another denoiser than demo-{options.family}: give a checkpoint that this command made."
            )
    cached, scaling, shift = latent_cache(options.family, autoencoder, out, source)
    print(
        f"autoencoder PSNR {psnr:.2f} dB, scaling {scaling}, shift {shift}, latents {tuple(cached['latents'].shape)}",
        flush=True,
    )

    for number, (name, plan) in enumerate(plans.items()):
        model = (model.refined() if number else model).to(device)
        plan = replace(plan, steps=options.steps or plan.steps)
        run = Run(model.reading, plan, out / f"{options.family}-{name}.safetensors", source, options.compile)
        print(
            f"{name}: {sum(weight.numel() for weight in model.denoiser.parameters()) / 1e6:.1f} M parameters",
            flush=True,
        )
        if not options.export and run.step < plan.steps:
            train_denoiser(model, run, autoencoder, (cached, scaling, shift), options)
        run.use_average()
        source = digest(run.state_file)
    told = {"begun with": options.begin_with and options.begin_with.name, "autoencoder PSNR": round(psnr, 2)}
    told["stages"] = {state.stem: record(state) for state in states}
    path = export(options.family, model, autoencoder, scaling, shift, options.weights)
    write_whole(
        path.with_suffix(".training.json"), lambda temporary: temporary.write_text(json.dumps(told) + "\n")
    )
    print(
        f"wrote {path.name}: {name} after {run.step} steps, {run.seconds / 60:.0f} min, loss {run.loss:.5f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
