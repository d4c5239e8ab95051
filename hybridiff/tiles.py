"""Decode a large picture tile by tile, so that the convolutions never see more than a tile.

The middle of the decoder, with its attention, runs whole: at the size of the latents it is small. Above it every tile
is computed with a border of its neighbours' features, and the borders are blended. What is left of the whole picture
are the group norms: all tiles go from norm to norm together, so that each norm uses the mean and variance of the whole.
The tiles that wait are in host memory.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.autoencoder import Autoencoder, Decoder, ResidualBlock

LARGE = 2**20  # pixels beyond which pictures are decoded in tiles where that is asked for
Step = tuple[nn.GroupNorm, Callable[..., tuple[Tensor, ...]]]


def steps(decoder: Decoder) -> Iterator[Step]:
    """What follows the middle in Decoder.forward, cut before each norm: (norm, function of the state and the normed).

    The state of a tile is (h,), or (shortcut, r) inside a residual block; the last tensor is the one to be normed.
    """

    def first(block: ResidualBlock) -> Callable:
        return lambda h, normed: (shortcut(block, h), block.conv1(F.silu(normed)))

    def second(block: ResidualBlock, after: Callable[[Tensor], Tensor]) -> Callable:
        return lambda h, r, normed: (after(h + block.conv2(F.silu(normed))),)

    stage: Any
    for stage in reversed(decoder.up):
        for block in stage.block:
            ends = block is stage.block[-1] and hasattr(stage, "upsample")
            yield block.norm1, first(block)
            yield block.norm2, second(block, stage.upsample if ends else lambda h: h)
    yield decoder.norm_out, lambda h, normed: (decoder.conv_out(F.silu(normed)),)


def shortcut(block: ResidualBlock, h: Tensor) -> Tensor:
    """The path of a residual block around its convolutions."""
    return block.nin_shortcut(h) if hasattr(block, "nin_shortcut") else h


def measure(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Mean and mean square of each group, in fp64: (B, C, H, W) -> (2, B, groups)."""
    x = x.unflatten(1, (norm.num_groups, -1))  # (B, groups, C / groups, H, W)
    return torch.stack([x.mean((2, 3, 4)), x.square().mean((2, 3, 4))]).double()


def apply(norm: nn.GroupNorm, x: Tensor, statistics: Tensor) -> Tensor:
    """Group norm with given statistics (2, B, groups): a factor and an offset for each channel. (B, C, H, W)."""
    each = norm.num_channels // norm.num_groups
    mean, square = (value.repeat_interleave(each, 1) for value in statistics)  # (B, C)
    scale = norm.weight * (square - mean.square()).clamp(min=0).add(norm.eps).rsqrt()
    offset = norm.bias - mean * scale
    return torch.addcmul(offset.to(x)[..., None, None], x, scale.to(x)[..., None, None])


def spans(size: int, tile: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """Along one side, (start, first own, end of own, end) of each tile: its own places and what it sees around them."""
    count = 1 if size <= tile else -(-size // (tile - overlap))
    cuts = [i * size // count for i in range(count + 1)]
    return [(max(0, a - overlap // 2), a, b, min(size, b + overlap // 2)) for a, b in zip(cuts, cuts[1:])]


def ramp(span: tuple[int, int, int, int], size: int, overlap: int, factor: int) -> Tensor:
    """Weight of each pixel of a tile along one side: of an overlap, a third is 0, a third rises, a third is 1."""
    start, _, _, end = span
    places, third = (torch.arange((end - start) * factor) + 0.5) / factor, overlap / 3
    up = (places - third) / third if start > 0 else torch.ones_like(places)
    down = (end - start - places - third) / third if end < size else torch.ones_like(places)
    return torch.minimum(up, down).clamp(0, 1)


def decode_tiled(
    vae: Autoencoder, latents: Tensor, tile: tuple[int, int] = (96, 96), overlap: int = 18,
    rank: int = 0, ranks: int = 1, all_gather: Callable[[Tensor], list[Tensor]] = lambda tensor: [tensor],
) -> Tensor:  # fmt: skip
    """Autoencoder.decode in tiles of at most `tile` latents (height, width): raw latents (B, C, h, w) -> images (B, 3, 8h, 8w).

    Neighbours share `overlap` latents; a pixel depends on some 12 latents on each side, mostly on the nearest six. Several ranks
    can share the tiles: each gives its rank, and `all_gather`, which brings every rank's tensor to every rank.
    """
    decoder, factor = vae.decoder, vae.config.factor
    h = decoder.conv_in(vae.post_quant_conv(latents) if vae.config.quant_convs else latents)
    for block in decoder.mid.values():
        h = block(h)
    batch, _, height, width = h.shape
    tiles = [(y, x) for y in spans(height, tile[0], overlap) for x in spans(width, tile[1], overlap)][
        rank::ranks
    ]
    waits = torch.device("cpu") if len(tiles) > 1 else h.device
    states: list[tuple[Tensor, ...]] = [(h[:, :, y[0] : y[3], x[0] : x[3]].to(waits),) for y, x in tiles]
    for norm, advance in steps(decoder):
        statistics = torch.zeros(2, batch, norm.num_groups, dtype=torch.float64, device=h.device)
        for (y, x), state in zip(tiles, states):
            scale = state[-1].shape[2] // (y[3] - y[0])
            rows, columns = (
                slice((own - start) * scale, (end - start) * scale) for start, own, end, _ in (y, x)
            )
            share = (y[2] - y[1]) * (x[2] - x[1]) / (height * width)
            statistics += share * measure(norm, state[-1].to(h.device)[:, :, rows, columns])
        statistics = sum(all_gather(statistics.cpu()), torch.zeros(())).to(h.device)
        for i, state in enumerate(states):
            moved = [tensor.to(h.device) for tensor in state]
            normed = apply(norm, moved[-1], statistics)
            states[i] = tuple(tensor.to(waits) for tensor in advance(*moved, normed))
    image = torch.zeros(batch, 3, height * factor, width * factor)
    total = torch.zeros(height * factor, width * factor)
    for (y, x), (part,) in zip(tiles, states):
        weight = ramp(y, height, overlap, factor)[:, None] * ramp(x, width, overlap, factor)
        rows, columns = (slice(span[0] * factor, span[3] * factor) for span in (y, x))
        image[:, :, rows, columns] += part.cpu() * weight
        total[rows, columns] += weight
    nothing = torch.zeros(())
    return (sum(all_gather(image), nothing) / sum(all_gather(total), nothing)).to(h.device)
