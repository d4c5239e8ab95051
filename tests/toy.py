"""A model of the tests' own, which shows all that a port adds: a network, its config, and a family.

As a script it is train_free_sample.py with this family in the list: `torchrun --nproc_per_node=2 tests/toy.py --weights FILE`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models  # noqa: E402
import train_free_sample  # noqa: E402
from models import clips  # noqa: E402
from models.autoencoder import Autoencoder  # noqa: E402
from models.clip import CLIPText  # noqa: E402
from models.embeddings import sinusoid  # noqa: E402
from models.family import Family, Part, Scheduler, channels_misfit  # noqa: E402
from models.names import official  # noqa: E402
from models.sizes import how_many, size  # noqa: E402
from models.tape import Split, best_cuts, spans_between  # noqa: E402


@dataclass(frozen=True)
class ToyConfig:
    """Sizes of the network."""

    channels: int  # of the latents
    width: int
    blocks: int
    text_width: int
    multiple = 1  # latents may have any height and width

    @classmethod
    def from_shapes(cls, shapes, given=None):
        channels, width = size(shapes, "lift.weight", 1, 4), size(shapes, "lift.weight", 0, 4)
        return cls(channels, width, how_many(shapes, r"blocks\.(\d+)\."), size(shapes, "text.weight", 1, 2))


class ToyConditioning(NamedTuple):
    text: Tensor  # (B, L, text_width)


class Toy(nn.Module):
    """A row of 3x3 convolutions, each moved by the time and the mean of the text. Units: the blocks."""

    Config, title, namings, surplus, json_fields = (
        ToyConfig,
        "row of convolutions",
        (("lift.", official),),
        "",
        {},
    )
    shardable = False

    def __init__(self, config):
        super().__init__()
        self.config, self.units, self.most_ranks = config, config.blocks, config.blocks
        self.lift = nn.Conv2d(config.channels, config.width, 1)
        self.text = nn.Linear(config.text_width, config.width)
        self.blocks = nn.ModuleList(
            nn.Conv2d(config.width, config.width, 3, padding=1) for _ in range(self.units)
        )
        self.lower = nn.Conv2d(config.width, config.channels, 1)

    def run(self, span, x, kept, t, conditioning, size):
        moved = self.text(conditioning.text.mean(1)) + sinusoid(t, self.config.width).to(
            conditioning.text.dtype
        )
        x = self.lift(x) if span[0] == 0 else x
        for block in self.blocks[span[0] : span[1]]:
            x = x + block(F.silu(x + moved[:, :, None, None]))
        return self.lower(x) if span[1] == self.units else x

    def split(self, ranks, times=None, nested=False):
        if nested or ranks > self.units:
            raise ValueError(
                f"a row of {self.units} convolutions cannot be split over {ranks} ranks like this"
            )
        return Split(
            spans_between(best_cuts(times or [[1.0] * self.units] * ranks), self.units), tuple(range(ranks))
        )

    def shapes(self, at, latents, text_tokens, shard=None):
        channels = self.config.channels if at == self.units else self.config.width
        return (torch.Size((latents[0], channels, *latents[2:])),)

    def parameters_of(self, span):
        first, last = ("lift.",) * (span[0] == 0), ("lower.",) * (span[1] == self.units)
        return ("text.", *first, *(f"blocks.{unit}." for unit in range(*span)), *last)

    def forward(self, x, t, conditioning):
        return self.run((0, self.units), x, {}, t, conditioning, x.shape[2:])


def encode(run, texts, size, configs, lengths, like):
    """The states of one CLIP."""
    return [ToyConditioning(state) for state, _ in run("clip_l", texts)]


FAMILY = Family(
    name="toy",
    title="Toy",
    mark=r"lift\.",
    folder_mark=r"lift\.",
    parts={
        "denoiser": Part(Toy, "toy.", "toy"),
        "vae": Part(Autoencoder, "first_stage_model.", "vae"),
        "clip_l": Part(
            CLIPText, "text.", "text_encoder", given={"activation": "gelu"}, tokenizer="tokenizer"
        ),
    },
    prediction="flow",
    encode=encode,
    guidance=4.0,
    size={"height": 64, "width": 48},
    switch={"window": 10, "slope": 1e-4, "cap": 10, "interval": 10},
    text_encoder=clips.text_encoder,
    scheduler=Scheduler(
        usual=r".*Flow.*", refused=r"(?!.*Flow).*", reason="a Toy is run only with flow matching"
    ),
    misfit=lambda configs: channels_misfit(configs["denoiser"].channels, configs),
)


if __name__ == "__main__":
    models.FAMILIES.append(FAMILY)
    sys.exit(train_free_sample.main())
