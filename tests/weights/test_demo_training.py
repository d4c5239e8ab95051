"""The demo training: a run that was killed goes on as if it had not been, a checkpoint can be trained on, the losses by hand."""

import json
import shutil
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from weights.demo import loop, text_encoders, train, train_vae
from weights.demo.denoisers import FAMILIES, PARTS, READING, SD3Demo, reading_error
from weights.demo.loop import Plan, Run
from weights.demo.scenes import COLOURS, SHAPES
from weights.demo.text_encoders import LENGTH, TextEncoders
from weights.demo.train import begun
from weights.demo.train_vae import Weights, autoencoder_loss, covered, psnr
from weights.load import open_checkpoint

PLAN = Plan(steps=12, batch=4, rate=1e-2, warmup=2, report_every=3, save_seconds=0.0)  # saves at every report


class Killed(Exception):
    """Stands for the kill."""


def run_in(folder, model_seed: int = 0, muon: float = 0.0) -> Run:
    torch.manual_seed(model_seed)
    model = nn.Sequential(OrderedDict(joint_blocks=nn.Linear(3, 8), gelu=nn.GELU(), last=nn.Linear(8, 1)))
    return Run(model, replace(PLAN, muon=muon), folder / "run.safetensors")


def fit(run: Run, killed_at: int | None = None) -> None:
    def loss_of(generator: torch.Generator, step: int) -> torch.Tensor:
        if step == killed_at:
            raise Killed
        x = torch.randn(PLAN.batch, 3, generator=generator)
        return (run.model(x) - x.sum(dim=1, keepdim=True)).square().mean()

    run.fit(loss_of)


@pytest.mark.parametrize("killed_at, muon", [(0, 0.0), (1, 0.0), (5, 0.0), (5, 3.0), (11, 3.0)])
def test_killed_run_goes_on(tmp_path, killed_at, muon):
    """Equal: weights, moving average and the curve of the loss, whatever the step it was killed at; with and without Muon."""
    if muon and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon: it came with 2.9")
    (tmp_path / "whole").mkdir()
    whole = run_in(tmp_path / "whole", muon=muon)
    assert len(whole.optimizers) == 1 + bool(muon)
    fit(whole)
    with pytest.raises(Killed):
        fit(run_in(tmp_path, muon=muon), killed_at)
    resumed = run_in(
        tmp_path, model_seed=1 if killed_at >= 3 else 0, muon=muon
    )  # what it begins with does not matter once a state is there
    assert resumed.step == killed_at - killed_at % 3
    fit(resumed)
    for name, weight in whole.trained.items():
        assert torch.equal(weight, resumed.trained[name]) and torch.equal(
            whole.average[name], resumed.average[name]
        )
    assert [step for step, _ in resumed.curve] == [3, 6, 9, 12] and resumed.curve == whole.curve
    assert loop.record(tmp_path / "run.safetensors")["steps"] == 12


def test_states_of_other_runs_are_refused(tmp_path):
    """One sentence for another plan, another source, another network; and for a loss that is no number, with the state before it kept."""
    fit(run_in(tmp_path))
    file, model = tmp_path / "run.safetensors", nn.Linear(3, 1)
    for kind, words in (
        (replace(PLAN, steps=13), "steps 12 instead of 13"),
        (replace(PLAN, rate=1e-3), "rate 0.01 instead of 0.001"),
    ):
        with pytest.raises(SystemExit, match=words):
            Run(model, kind, file)
    with pytest.raises(SystemExit, match="source .* instead of other"):
        Run(model, PLAN, file, "other")
    with pytest.raises(SystemExit, match="another network"):
        Run(model, PLAN, file)
    (tmp_path / "none").mkdir()
    run = run_in(tmp_path / "none")
    with pytest.raises(SystemExit, match="the loss is nan at step 3"):
        run.fit(lambda generator, step: run.model(torch.full((1, 3), float("nan"))).sum())
    assert not run.state_file.exists()


def test_the_whole_command(tmp_path, monkeypatch, capsys):
    """Two steps a stage: a checkpoint that opens and its record; killed before the last stage it goes on; without a state nothing is exported."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon: it came with 2.9")
    weights, out = tmp_path / "weights", tmp_path / "out"
    weights.mkdir()
    for name in text_encoders.FILES:
        shutil.copy(train.HERE / name, weights)
    monkeypatch.setattr(text_encoders, "PLAN", replace(text_encoders.PLAN, steps=2, batch=2))
    monkeypatch.setitem(train_vae.PLANS, "sd3", replace(train_vae.PLAN, steps=2, batch=2))
    monkeypatch.setattr(train_vae, "LATENTS", 32)
    monkeypatch.setattr(text_encoders, "accuracy", lambda *_: {})
    monkeypatch.setattr(SD3Demo, "sample", lambda self, ids, empty, noise, **_: noise)
    kept = train.train_denoiser

    def call(*options: str) -> None:
        monkeypatch.setattr(
            "sys.argv",
            [
                "train",
                "--family",
                "sd3",
                "--out",
                str(out),
                "--weights",
                str(weights),
                "--steps",
                "2",
                *options,
            ],
        )
        train.main()

    def killed(model, run, *rest) -> None:
        if "denoiser" in run.state_file.stem:
            raise Killed
        kept(model, run, *rest)

    def refused(*options: str) -> str:
        with pytest.raises(SystemExit):
            call(*options)
        return capsys.readouterr().err

    monkeypatch.setattr(train, "train_denoiser", killed)
    with pytest.raises(Killed):
        call()
    assert (
        "sd3-denoiser.safetensors yet; train first" in refused("--export")
        and not (weights / "demo-sd3.safetensors").exists()
    )
    monkeypatch.setattr(train, "train_denoiser", kept)
    call()
    told = json.loads((weights / "demo-sd3.training.json").read_text())
    assert list(told["stages"]) == ["text-encoders", "sd3-vae", "sd3-coarse", "sd3-denoiser"]
    assert all(
        stage["steps"] == 2 and stage["device"] == "cpu" and len(stage["loss"]) == 1
        for stage in told["stages"].values()
    )
    checkpoint = open_checkpoint(str(weights / "demo-sd3.safetensors"))
    assert checkpoint.family == "sd3" and checkpoint.defaults["guidance"] == 3.0
    (weights / "demo-sd3.safetensors").unlink()
    call("--export")
    assert open_checkpoint(str(weights / "demo-sd3.safetensors")).digest() == checkpoint.digest()
    (out / "sd3-coarse.safetensors").write_bytes((out / "sd3-denoiser.safetensors").read_bytes())
    with pytest.raises(SystemExit, match="another run"):
        call()
    assert "of family sdxl" in refused("--begin-with", "demo-sdxl")


def test_killed_while_it_saves(tmp_path, monkeypatch):
    """Equal: the state on disk is the one before."""
    with pytest.raises(Killed):
        fit(run_in(tmp_path), killed_at=4)
    before = (tmp_path / "run.safetensors").read_bytes()

    def half(path: Path, whole: bytes) -> None:
        path.write_text("half of it")
        raise Killed

    with monkeypatch.context() as context, pytest.raises(Killed):
        context.setattr(Path, "write_bytes", half)
        fit(run_in(tmp_path))
    assert (tmp_path / "run.safetensors").read_bytes() == before and len([*tmp_path.iterdir()]) == 1


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_training_begins_with_a_checkpoint(family):
    """Equal: the denoiser is the checkpoint's."""
    given = open_checkpoint(f"demo-{family}")
    kept, state = (
        given.load("denoiser", torch.float32).state_dict(),
        begun(family, TextEncoders(100, 100), given).denoiser.state_dict(),
    )
    assert state.keys() == kept.keys() and all(
        torch.equal(tensor, kept[name]) for name, tensor in state.items()
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_autoencoders_alone_are_clean(family):
    """32 dB or better on unseen scenes."""
    with torch.inference_mode():
        assert psnr(open_checkpoint(f"demo-{family}").load("vae", torch.float32), count=16) > 32


def test_single_latents_begin_where_patches_stand():
    """Close: a patch of four equal latents is read as each of them is, and what was written for the four is written as their mean.
    Equal: all that lies between."""
    torch.manual_seed(0)
    coarse = SD3Demo(TextEncoders(100, 100), patch=2)
    nn.init.normal_(coarse.denoiser.final_layer.linear.weight)
    fine = begun("sd3", coarse.encoders, SimpleNamespace(load=lambda *_: coarse.denoiser))
    assert fine.denoiser.config.patch == 1
    latent, states = torch.randn(1, 16, 1, 1), torch.randn(1, coarse.denoiser.config.width)
    embedded = [
        model.denoiser.x_embedder.proj(latent.expand(1, 16, side, side))
        for model, side in ((coarse, 2), (fine, 1))
    ]
    torch.testing.assert_close(*embedded)
    written = [model.denoiser.final_layer.linear(states) for model in (coarse, fine)]
    torch.testing.assert_close(written[0].unflatten(1, (4, 16)).mean(dim=1), written[1])
    resized = ("pos_embed", "x_embedder.", "final_layer.linear.")
    between = [
        {name: tensor for name, tensor in model.denoiser.state_dict().items() if not name.startswith(resized)}
        for model in (coarse, fine)
    ]
    assert all(torch.equal(tensor, between[1][name]) for name, tensor in between[0].items())


def test_covered_pixels_are_counted():
    """Of every 2 x 2; an object that begins at an odd pixel covers one of the four there."""
    pictures = torch.zeros(1, 3, 32, 32)
    pictures[:, 1, 1:9, 1:9] = 0.5
    counts = covered(pictures)
    assert (
        counts.dtype == torch.uint8 and counts[0, 0, 0] == 1 and counts[0, 1, 1] == 4 and counts.sum() == 64
    )


def test_reading_of_outlines_by_hand():
    """Of 2 x 2 cells of 16 x 16 pixels, with 4 x 4 parts each, two parts of the lower left one are covered: to say so costs nothing, a part wrong costs."""
    pictures = torch.zeros(1, 3, 32, 32)
    pictures[:, 1, 16:24, 8:12] = 0.5
    shares = covered(pictures) / 4
    sure = torch.full((1, 4, PARTS, PARTS), -50.0)
    sure[0, 2, :2, 2] = 50.0
    scenes, rest = torch.zeros(1, 2, 4, dtype=torch.long), torch.zeros(1, 4, 1 + len(SHAPES) + len(COLOURS))
    rest[..., 0] = rest[..., 1 + len(SHAPES)] = 100.0
    read = torch.cat([rest, sure.flatten(2)], dim=2)
    assert reading_error(read, scenes, shares, (0.5, 1.0)) < 1e-6
    read[0, 2, -1] = 50.0
    assert reading_error(read, scenes, shares, (0.5, 2.0)).item() == pytest.approx(2.0 * 50 / 64)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_one_step_of_a_denoiser(family):
    """A finite loss, which has a gradient in every weight of the last layer and in the reader's rows that count."""
    torch.manual_seed(0)
    encoders = TextEncoders(100, 100).requires_grad_(False)
    model = FAMILIES[family](encoders)
    side, channels = model.reading.cells, model.latent_channels
    ids, empty = torch.randint(100, (2, 3, LENGTH)), torch.zeros(1, 3, LENGTH, dtype=torch.long)
    scenes, shares = torch.zeros(2, 2, side**2, dtype=torch.long), torch.rand(2, 64, 64)
    loss = model.loss(
        model.reading,
        torch.randn(2, channels, 16, 16),
        ids,
        scenes,
        shares,
        empty,
        torch.Generator().manual_seed(0),
    )
    loss.backward()
    assert loss.isfinite()
    standing, outlines = model.reading.reader.weight.grad.split([1 + len(SHAPES) + len(COLOURS), PARTS**2])
    assert standing.abs().sum() > 0 and (outlines.abs().sum() > 0) == (READING[family][1] > 0)
    last = model.denoiser.out[2] if family == "sdxl" else model.denoiser.final_layer.linear
    assert last.weight.grad.abs().sum() > 0


class Nearest:
    """An autoencoder that can be followed by hand: the latents are every second pixel, the pictures those enlarged; no posterior noise."""

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = images[:, :, ::2, ::2]
        return mean, torch.full_like(mean, -30.0)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


@pytest.mark.parametrize("halved", [False, True])
def test_autoencoder_loss_by_hand(halved):
    """One colour costs nothing; a chessboard of squares of two pixels its fast changes, and halved, where its latents cancel, its error too."""
    noise = torch.zeros(1, 1, 4, 4)
    assert autoencoder_loss(Nearest(), torch.ones(1, 1, 8, 8), noise, Weights(0.0, 0.5), halved) == 0
    board = (
        torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        .repeat(2, 2)
        .repeat_interleave(2, 0)
        .repeat_interleave(2, 1)[None, None]
    )
    loss = autoencoder_loss(Nearest(), board, noise, Weights(kl=0.0, fast=0.5), halved)
    edges = 2 + 2  # between neighbours of a halved picture, which is a chessboard of single pixels
    assert loss.item() == pytest.approx(0.5 + (1 + 1 + edges if halved else 0))
