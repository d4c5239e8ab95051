"""SDXL and SD3-medium at full size without their weights, or tiny ones of the same kinds; shared with the benchmarks."""

from copy import deepcopy
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from hybridiff.denoise import Task
from hybridiff.pipeline import draw_noise
from hybridiff.samplers import make_sampler
from models import family_of
from models.embeddings import sinusoid
from models.mmdit import MMDiT, MMDiTConditioning, MMDiTConfig
from models.unet import UNet, UNetConditioning, UNetConfig

FACTOR = 8  # pixels a side of one latent
SEED, BLOCK = 0, 2**24  # of the random values, and how many are drawn before they repeat
FULL = {"sdxl": UNetConfig(), "sd3": MMDiTConfig()}
TINY = {
    "sdxl": UNetConfig(
        channels=16, depths=(0, 1, 1), middle_depth=1, heads=(1, 2, 4), context_width=24, vector_width=20, groups=8
    ),
    "sd3": MMDiTConfig(width=32, depth=4, heads=2, context_width=24, pooled_width=20, positions=12),
}  # fmt: skip
TOKENS = {"sdxl": 77, "sd3": 77 + 256}  # of the text: CLIP's, and T5's after them


@cache
def on_meta(family: str, tiny: bool) -> nn.Module:
    """The network without weights, on the meta device."""
    with torch.device("meta"):
        return (UNet if family == "sdxl" else MMDiT)((TINY if tiny else FULL)[family])


def size_width(config: UNetConfig) -> int:
    """Width of one of the six sinusoids in the U-Net's vector: 256 at full size."""
    return 256 if config.vector_width > 6 * 256 else 2


def fill(net: nn.Module) -> None:
    """Seeded random weights, quickly: matrices uniform, of variance 1 / fan-in; norms one, biases zero."""
    block = torch.rand(BLOCK, generator=torch.Generator().manual_seed(SEED)) * 2 - 1
    block = block.to(next(net.parameters()).device)
    for name, tensor in net.state_dict().items():
        if tensor.ndim == 1:
            tensor.fill_(float(name.endswith("weight")))
            continue
        flat, scale = tensor.view(-1), (3 / tensor[0].numel()) ** 0.5
        for start in range(0, flat.numel(), BLOCK):
            piece = flat[start : start + BLOCK]
            piece.copy_(block[: piece.numel()] * scale)


def map_weights(net: nn.Module, path: Path, dtype: torch.dtype) -> None:
    """Makes the network's tensors views of a file, so that ranks share its memory; the first to come fills it (`fill`)."""
    new, places, total = not path.exists(), {}, 0
    for name, tensor in net.state_dict().items():
        places[name] = total
        total += -(-tensor.numel() // 64) * 64  # each begins at a whole cache line
    flat = torch.from_file(str(path), shared=True, size=total, dtype=dtype)
    views = {
        name: flat[places[name] :][: tensor.numel()].view(tensor.shape)
        for name, tensor in net.state_dict().items()
    }
    net.load_state_dict(views, assign=True)
    if new:
        with torch.no_grad():
            fill(net)


def texts(
    family: str, config: UNetConfig | MMDiTConfig, size: int, dtype: torch.dtype
) -> dict[str, tuple[Tensor, Tensor]]:
    """ "cond" and "uncond" -> random text (1, L, context width) and pooled text (1, width)."""
    generator = torch.Generator().manual_seed(SEED)
    pooled = config.vector_width - 6 * size_width(config) if family == "sdxl" else config.pooled_width
    shapes = (1, TOKENS[family], config.context_width), (1, pooled)
    return {
        text: tuple(torch.randn(s, generator=generator).to(dtype) for s in shapes)
        for text in ("cond", "uncond")
    }


def make_task(
    family: str, size: int, steps: int, dtype: torch.dtype, tiny: bool = False, device: torch.device | str = "meta",
    weights: str | None = None
) -> Task:  # fmt: skip
    """A picture of size x size pixels in `steps` steps by the family's default sampler; the same task in every process.

    On the meta device there are only shapes and dtypes, elsewhere weights and texts are random. With `weights` they lie in that file.
    """
    net = deepcopy(on_meta(family, tiny)).to(dtype).eval().requires_grad_(False)
    config = net.config
    if weights:
        map_weights(net, Path(weights), dtype)
    elif torch.device(device).type != "meta":
        net = net.to_empty(device=device)
        fill(net)
    told = texts(family, config, size, dtype)
    if family == "sdxl":  # pooled text, then the six sizes
        sizes = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32)
        sizes = sinusoid(sizes, size_width(config)).flatten(1).to(dtype)
        told = {
            text: UNetConditioning(t, torch.cat([pooled, sizes], 1)) for text, (t, pooled) in told.items()
        }
    else:
        told = {text: MMDiTConditioning(*pair) for text, pair in told.items()}
    told = {text: type(value)(*(t.to(device) for t in value)) for text, value in told.items()}
    channels = config.in_channels if family == "sdxl" else config.latent_channels
    noise = draw_noise((1, channels, size // FACTOR, size // FACTOR), SEED).to(device)
    model = family_of(family)
    return Task(net.to(device), make_sampler(model.prediction, None, steps), told, model.guidance, noise)
