"""Decoding in tiles against decoding whole: `close`, above 55 dB; the group norms see the whole picture in both."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybridiff.tiles import decode_tiled, ramp, spans
from models.autoencoder import Autoencoder, AutoencoderConfig
from weights.load import open_checkpoint

torch.set_num_threads(1)


def psnr(one: Tensor, other: Tensor) -> float:
    """Peak signal to noise ratio in dB of images in [-1, 1]."""
    return (10 * torch.log10(4 / (one.clamp(-1, 1) - other.clamp(-1, 1)).square().mean())).item()


def random_autoencoder() -> Autoencoder:
    """Random weights that keep the size of the features, with SDXL's levels and quant convolutions."""
    torch.manual_seed(0)
    vae = Autoencoder(AutoencoderConfig(channels=16, groups=4)).eval()
    for name, tensor in vae.state_dict().items():
        if tensor.ndim > 1:
            tensor.normal_(std=tensor[0].numel() ** -0.5)
        else:
            tensor.uniform_(0.5, 1.5) if "norm" in name and name.endswith("weight") else tensor.uniform_(
                -0.3, 0.3
            )
    return vae


@pytest.mark.parametrize("name", ["demo-sdxl", "demo-sd3", "random"])
@pytest.mark.parametrize("size", [(40, 56), (72, 24)])
@torch.inference_mode()
def test_tiles_make_the_picture_of_the_whole(name: str, size: tuple[int, int]):
    """Latents of a smooth scene, one corner unlike the rest, so that tiles differ in mean and variance."""
    vae = random_autoencoder()
    if name != "random":
        vae = open_checkpoint(name).load("vae", torch.float32, decoder_only=True)
    torch.manual_seed(1)
    latents = F.interpolate(torch.randn(1, vae.config.latent_channels, 5, 5), size, mode="bicubic")
    latents[:, :, :12, :10] = 2 * torch.randn(latents[:, :, :12, :10].shape) + 1
    whole, tiled = vae.decode(latents), decode_tiled(vae, latents, tile=(40, 40), overlap=18)
    assert tiled.shape == whole.shape and psnr(whole, tiled) > 55
    assert len(spans(size[0], 40, 18)) * len(spans(size[1], 40, 18)) > 1


@pytest.mark.parametrize("size", [1, 8, 96, 97, 128, 200, 512])
def test_tiles_cover_every_place(size: int):
    found = spans(size, tile=96, overlap=18)
    assert [own for _, own, _, _ in found[1:]] == [end for _, _, end, _ in found[:-1]]
    assert found[0][:2] == (0, 0) and found[-1][2:] == (size, size)
    assert all(end - start <= 96 for start, _, _, end in found)
    total = torch.zeros(size * 8)
    for span in found:
        total[span[0] * 8 : span[3] * 8] += ramp(span, size, 18, 8)
    assert torch.allclose(total, torch.ones(size * 8))


@torch.inference_mode()
def test_one_tile_is_the_whole():
    vae, latents = random_autoencoder(), torch.randn(2, 4, 12, 16)
    torch.testing.assert_close(decode_tiled(vae, latents), vae.decode(latents), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_ranks_share_a_decode():
    """Two threads play the ranks: `equal` between them, `close` to the same tiles on one (sums in another order), above 50 dB to the whole."""
    vae = open_checkpoint("demo-sdxl").load("vae", torch.float32, decoder_only=True)
    torch.manual_seed(1)
    latents = F.interpolate(torch.randn(1, 4, 5, 5), (64, 48), mode="bicubic")
    told: list[list[Tensor]] = [[], []]  # what each rank gave, in order
    gate = threading.Barrier(2)

    def on_rank(rank: int) -> Tensor:
        def all_gather(tensor: Tensor) -> list[Tensor]:
            told[rank].append(tensor)
            gate.wait(60)
            both = [each[len(told[rank]) - 1] for each in told]
            gate.wait(60)
            return both

        with torch.inference_mode():
            return decode_tiled(vae, latents, (50, 48), 18, rank, 2, all_gather)

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(on_rank, range(2))
    assert torch.equal(one, other)
    torch.testing.assert_close(one, decode_tiled(vae, latents, (50, 48), 18), rtol=1e-4, atol=1e-4)
    assert psnr(one, vae.decode(latents)) > 50
