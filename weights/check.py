"""Compares the parts of a checkpoint, by their headers, with the networks that their own sizes describe."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from models.autoencoder import Autoencoder, AutoencoderConfig
from models.clip import CLIPConfig, CLIPText
from models.mmdit import MMDiT, MMDiTConfig
from models.t5 import T5Config, T5Encoder
from models.unet import UNet, UNetConfig
from weights import sniff
from weights.files import FLOATS, Entry, WeightsError, some
from weights.layouts import Source, translate
from weights.parts import Part

CLASSES = {"unet": UNet, "mmdit": MMDiT, "vae": Autoencoder, "clip": CLIPText, "t5": T5Encoder}
MOST = 100  # blocks, layers or levels in a row; the largest official network has 38
Config = UNetConfig | MMDiTConfig | AutoencoderConfig | CLIPConfig | T5Config


class NoInit(TorchFunctionMode):
    """Leaves out the initialisation of parameters, which costs seconds at full size even on the meta device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def build(kind: str, config: Config) -> nn.Module:
    """The network on the meta device: names and shapes, no memory."""
    with torch.device("meta"), NoInit():
        return CLASSES[kind](config)


@dataclass(frozen=True)
class Fitted:
    """A part that fits its network in every name, shape and dtype."""

    kind: str  # "unet", "mmdit", "vae", "clip" or "t5"
    place: Path
    config: Config
    sources: dict[str, Source]
    entries: dict[str, Entry]
    module: nn.Module  # on the meta device

    @property
    def bytes_by_dtype(self) -> Counter:
        """Bytes in the file for each dtype, as safetensors spells it."""
        counts = Counter()
        for key in {key for source in self.sources.values() for key in source.keys}:
            counts[self.entries[key].dtype] += self.entries[key].size
        return counts


def part_config(name: str, part: Part, shapes: sniff.Shapes, family: str) -> Config:
    """The config that the shapes (official names) and what is given tell."""
    if part.kind == "vae":
        return sniff.autoencoder(shapes, family, part.given)
    if part.kind == "clip":
        activation = {"clip_l": "quick_gelu", "clip_g": "gelu"}[name]
        return sniff.clip(
            shapes, activation, part.given, unused=1 if (name, family) == ("clip_l", "sdxl") else 0
        )
    return {"unet": sniff.unet, "mmdit": sniff.mmdit, "t5": sniff.t5}[part.kind](shapes, part.given)


def unused_keys(config: CLIPConfig) -> tuple[str, str]:
    """Prefixes of what SDXL never uses of CLIP-L: it takes the input of the last layer, and no pooled state."""
    return f"text_model.encoder.layers.{config.layers - 1}.", "text_model.final_layer_norm."


def check_part(name: str, part: Part, family: str) -> Fitted:
    """The part with its config and network; WeightsError with one list of all that does not fit."""
    sources, unexpected = translate(part.kind, part.entries)
    shapes, misshaped = {}, []
    if counted := next(
        (name for name in sources for number in re.findall(r"\.(\d+)\.", name) if int(number) >= MOST), None
    ):
        raise WeightsError(
            f"{part.place}: its {name} is not what it should be: tensor {some([counted])} counts further than any"
            f" network does ({MOST})."
        )
    for target, source in sources.items():
        found = [part.entries[key].shape for key in source.keys]
        shape = source.shape(found)
        if shape is None:
            misshaped.append(f"{source.keys[0]}: {list(found[0])}")
        else:
            shapes[target] = shape
    try:
        config = part_config(name, part, shapes, family)
        module = build(part.kind, config)
    except WeightsError as error:
        raise WeightsError(
            f"{part.place}: its {name} is not complete or not what it should be: {error}."
        ) from None
    except (RuntimeError, ValueError, TypeError) as error:  # torch: sizes whose product overflows
        raise WeightsError(
            f"{part.place}: its {name} describes an impossible network: {error!s:.200}."
        ) from None
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    spare = unused_keys(config) if (name, family) == ("clip_l", "sdxl") else ()
    missing = [key for key in expected if key not in sources and not key.startswith(spare)]
    unexpected += [key for target, source in sources.items() if target not in expected for key in source.keys]
    sources = {target: source for target, source in sources.items() if target in expected}
    misshaped += [f"{key}: {list(shapes[key])} instead of {list(expected[key])}" for key in sources
                  if key in shapes and shapes[key] != expected[key]]  # fmt: skip
    naming = ""  # `missing` has our names, `unexpected` the file's
    if any(target not in source.keys for target, source in sources.items()):
        naming = f", named as {'by Hugging Face' if part.kind == 'clip' else 'in the official single file'}"
    used = {key for source in sources.values() for key in source.keys}
    other = [
        f"{key}: {part.entries[key].dtype}" for key in sorted(used) if part.entries[key].dtype not in FLOATS
    ]
    kinds = ((f"missing{naming}", missing), ("unexpected", sorted(unexpected)), ("mis-shaped", misshaped),
             ("of a dtype that is no float known here", other))  # fmt: skip
    report = [f"{len(names)} {what} ({some(names)})" for what, names in kinds if names]
    if report:
        raise WeightsError(
            f"{part.place}: the tensors of its {name} do not make up the network: {'; '.join(report)}."
        )
    return Fitted(part.kind, part.place, config, sources, part.entries, module)


def check_together(path: Path, family: str, configs: Mapping[str, Config]) -> None:
    """WeightsError unless the widths of the parts that are there fit each other."""
    denoiser, clip_l, clip_g, t5, vae = (
        configs.get(p) for p in ("denoiser", "clip_l", "clip_g", "t5", "vae")
    )
    clips = clip_l.width + clip_g.width if clip_l and clip_g else None
    problems = []
    if family == "sdxl":
        channels = denoiser.out_channels
        if denoiser.in_channels != channels:
            problems.append(
                f"its U-Net takes {denoiser.in_channels} channels and gives {channels}, as for inpainting"
                " or editing, which is not done here"
            )
        if clips is not None and clips != denoiser.context_width:
            problems.append(
                f"text encoders {clips} wide do not fit a U-Net that takes {denoiser.context_width}"
            )
        if clip_g is not None:
            sizes = denoiser.vector_width - (clip_g.projection or 0)
            if clip_g.projection is None or sizes <= 0 or sizes % 12:
                problems.append(
                    f"pooled text of {clip_g.projection} and six sizes do not make up the U-Net's vector of"
                    f" {denoiser.vector_width}"
                )
    else:
        channels = denoiser.latent_channels
        if clip_g is not None and clip_g.projection is None:
            problems.append("its clip_g has no text_projection")
        elif clips is not None and pooled_width(clip_l) + pooled_width(clip_g) != denoiser.pooled_width:
            problems.append(
                f"CLIP encoders with pooled states of {pooled_width(clip_l)} and {pooled_width(clip_g)} do"
                f" not fit an MMDiT that takes {denoiser.pooled_width}"
            )
        if t5 is not None and t5.width != denoiser.context_width:
            problems.append(f"T5 {t5.width} wide does not fit an MMDiT that takes {denoiser.context_width}")
    if clips is not None and clip_l.positions != clip_g.positions:
        problems.append(f"its CLIP encoders have {clip_l.positions} and {clip_g.positions} positions")
    if not problems and vae is not None and channels != vae.latent_channels:
        problems.append(
            f"an autoencoder of {vae.latent_channels} channels does not fit a denoiser of {channels}"
        )
    if problems:
        raise WeightsError(f"{path} cannot be run: {'; '.join(problems)}.")


def pooled_width(config: CLIPConfig) -> int:
    """Width of the pooled state."""
    return config.projection or config.width
