"""What the benchmarks share: SDXL and SD3-medium at full size without their weights, the rows that they compare, tables."""

import os
import platform
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from hybridiff.denoise import Task
from hybridiff.pipeline import draw_noise
from hybridiff.presets import PRESETS, usual_reuse
from hybridiff.samplers import make_sampler
from hybridiff.strategies import STRATEGIES, Settings, Strategy
from hybridiff.switching import SwitchRule
from models import family_of
from models.embeddings import sinusoid
from models.mmdit import MMDiT, MMDiTConditioning, MMDiTConfig
from models.unet import UNet, UNetConditioning, UNetConfig

FAMILIES = ("sdxl", "sd3")
SHARES = {  # of the steps that may be saved, see presets.usual_reuse
    "step-extrapolation": (1 / 6, PRESETS["balanced"].share, PRESETS["fast"].share, 0.8),
    "inner-reuse": (1 / 3, 2 / 3),
    "guided-pipeline": (1 / 3, 2 / 3, 1),
}
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


def intervals(steps: int) -> list[int]:
    """k of the rows of the paper's strategy: 5, 10, 20, 30 of 50 steps (its Table 4), of others the same shares."""
    return list(dict.fromkeys(max(1, round(k * steps / 50)) for k in (5, 10, 20, 30)))


def with_interval(rule: SwitchRule, steps: int, k: int) -> SwitchRule:
    """The rule with k pipelined steps; its cap lies earlier where they would pass the last step."""
    return replace(rule, interval=k, cap=max(1, min(rule.cap, steps - k - 1)))


def row_plan(
    family: str, row: str, steps: int, ranks: int | None = None, tiny: bool = False
) -> tuple[Strategy, Settings]:
    """The strategy, on its usual number of ranks or another, and settings of a row: "serial", "batched", "condition", "paper-K", a preset of ours, or
    "step-extrapolation-N", "inner-reuse-N" or "guided-pipeline-N" with N saved steps.

    The switch comes by the cap, so that it does not depend on what the networks predict: the paper's cap, or earlier where
    the k + 1 pipelined steps would else pass the last step.
    """
    name, _, number = row.rpartition("-") if row[-1].isdigit() else (row, "", "5")
    if row in ("balanced", "fast"):
        name, settings = PRESETS[row].strategy, Settings(steps, reuse=usual_reuse(steps, PRESETS[row].share))
    elif name in SHARES:
        settings = Settings(steps, reuse=replace(usual_reuse(steps, 0.0), count=int(number)))
    else:
        settings = Settings(
            steps,
            with_interval(
                SwitchRule(window=steps + 1, slope=0.0, cap=family_of(family).switch["cap"]),
                steps,
                int(number),
            ),
        )
    return STRATEGIES[name].on(on_meta(family, tiny), ranks), settings


def machine() -> dict[str, object]:
    """Where and with what something was measured."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return {
        "processor": names[0] if names else platform.machine(), "cores": os.cpu_count(), "memory GB": round(memory, 1),
        "torch": torch.__version__, "python": platform.python_version(), "seed": SEED,
    }  # fmt: skip


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in markdown; floats with three digits after the point, None as nothing."""

    def cell(value: object) -> str:
        return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def in_words(conditions: dict[str, object]) -> str:
    """Conditions in one line."""
    return "; ".join(f"{name} {value}" for name, value in conditions.items())
