"""What a model is, as data: a `Family` holds everything that the rest of the project needs to know of one.

A port adds a network file if the network is new, a file with its family, and a line in `models/__init__.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

Configs = Mapping[str, Any]  # part -> config of its network, of the parts that are there


def image_latents(size: tuple[int, int], vae: Any) -> torch.Size:
    """Shape of a picture's latents, (1, C, h, w), for its height and width in pixels."""
    return torch.Size((1, vae.latent_channels, *(side // vae.factor for side in size)))


@dataclass(frozen=True)
class Part:
    """One network of a checkpoint, and where its tensors stand.

    `network`: a class with `Config.from_shapes(shapes, given)`, `title`, `namings`, `surplus` (a regex of names that some files hold
    and nobody needs) and `json_fields` (field of a Hugging Face config.json -> what `from_shapes` calls it).
    """

    network: type[nn.Module]
    prefix: str  # of its names in the official single file
    folder: str  # in a Hugging Face folder
    given: Mapping[str, Any] = field(default_factory=dict)  # what shapes cannot tell, unless the file does
    # fields of config.json -> the only value done here
    fixed: Mapping[str, Any] = field(default_factory=dict)
    table: str | None = None  # its table in the metadata entry hybridiff.config; by default the part's name
    optional: bool = False  # a picture can be made without it
    tokenizer: str | None = None  # text encoders: the sub-folder of a Hugging Face folder
    pad: int | None = None  # id that fills up CLIP's rows; None for the end token
    spare: Callable[[Any], tuple[str, ...]] = lambda config: ()  # how names begin that may be missing
    unused: str = ""  # regex of names that are not used where they stand in a single file
    files: tuple[str, ...] = ()  # official names of files that hold it alone


class Refusal(NamedTuple):
    """A tensor by which a checkpoint is told apart that looks like the family's and is not run."""

    name: str  # regex, of the name in the file or the denoiser's folder
    words: str  # what the checkpoint is, and that it is not run
    width: int | None = None  # its last dimension, if that is what tells


@dataclass(frozen=True)
class Scheduler:
    """What a Hugging Face folder's scheduler_config.json may say."""

    usual: str  # regex of diffusers' classes that need no remark
    refused: str  # of those that belong to another kind of model
    reason: str
    fixed: Mapping[str, Any] = field(default_factory=dict)  # fields of training -> the only value done here
    # of sampling -> what is done here, else a remark
    sampled: Mapping[str, Any] = field(default_factory=dict)
    unset: tuple[str, ...] = ()  # fields that must not be set
    defaults: tuple[str, ...] = ()  # fields that the samplers go by


@dataclass(frozen=True)
class Family:
    """All that weights/, hybridiff/ and the program need to know of a model. Nothing else names one."""

    name: str
    title: str
    parts: Mapping[str, Part]  # "denoiser", "vae", then the text encoders in the order in which they run
    mark: str  # regex of names that no other family's denoiser has, in the single file ...
    folder_mark: str  # ... and in the folder
    prediction: Literal["epsilon", "flow"]  # picks the samplers, see hybridiff/samplers.py
    encode: Callable[..., Sequence[Any]]  # see `hybridiff.text.encode`
    guidance: float
    size: Mapping[str, int]  # height and width in pixels
    switch: Mapping[str, float]  # the paper's numbers at 50 steps, see `hybridiff.switching.SwitchRule`
    # shapes of a file -> the part it holds
    text_encoder: Callable[[Mapping[str, tuple[int, ...]]], str | None]
    scheduler: Scheduler
    misfit: Callable[[Configs], list[str]]  # sentences on parts that do not fit each other
    refusals: tuple[Refusal, ...] = ()
    refused_predictions: tuple[
        tuple[str, str], ...
    ] = ()  # regex of modelspec.prediction_type, what the file is
    latents: Callable[[tuple[int, int], Any], torch.Size] = (
        image_latents  # (size in pixels, config of the autoencoder)
    )
    zero_negative: bool = False  # zeros stand for no negative prompt, unless a folder says otherwise
    beside: bool = False  # text encoders are looked for beside a single file
    sources: Mapping[str, str] = field(default_factory=dict)  # part -> what to fetch, and where it is


def channels_misfit(channels: int, configs: Configs) -> list[str]:
    """A sentence where the autoencoder's latents are not the denoiser's."""
    vae = configs.get("vae")
    if vae is None or vae.latent_channels == channels:
        return []
    return [f"an autoencoder of {vae.latent_channels} channels does not fit a denoiser of {channels}"]
