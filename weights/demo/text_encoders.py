"""Stage one of the demo training: text encoders that understand the captions before any picture is drawn.

The big models use encoders that were trained beforehand and are frozen; so do the demos, and the same CLIPs can serve both families,
as CLIP-L and bigG serve SDXL and SD3. They are trained on captions alone: from whatever a denoiser gets to see of them
(each pooled state, each sequence of token states) a small reader must be able to tell what the scene holds where.
"""

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

from models.clip import CLIPConfig, CLIPText
from models.t5 import T5Config, T5Encoder
from models.tokenizers import CLIPTokenizer, T5Tokenizer
from weights.demo.loop import Plan, Run, digest
from weights.demo.scenes import COLOURS, RELATIONS, SHAPES, SIZES, Scene, hint, sample
from weights.demo.tokenizers import FILES

LENGTH = 24  # positions of every text encoder
CLIP_SIZES = {"positions": LENGTH, "width": 128, "layers": 4, "heads": 2, "mlp_width": 512}
T5_SIZES = {"width": 256, "layers": 3, "heads": 4, "head_width": 64, "mlp_width": 512}
PLAN = Plan(steps=3000, batch=64, rate=1.5e-3, report_every=100, ema=0.998)
NOTHING = "nothing"
ANSWERS = {  # question: possible answers; the first object is the one on the left or on top
    "background": (*COLOURS,),
    "arrangement": ("single", "row", "column"),
    **{
        f"{place} {what}": (NOTHING, *names)
        for place in ("first", "second")
        for what, names in (("colour", COLOURS), ("shape", SHAPES), ("size", SIZES))
    },
}


class TextEncoders(nn.Module):
    """CLIP-L-like, bigG-like and T5-like."""

    def __init__(self, vocabulary: int, t5_vocabulary: int):
        super().__init__()
        self.clip_l = CLIPText(CLIPConfig(vocabulary=vocabulary, activation="quick_gelu", **CLIP_SIZES))
        self.clip_g = CLIPText(
            CLIPConfig(vocabulary=vocabulary, activation="gelu", projection=128, **CLIP_SIZES)
        )
        self.t5 = T5Encoder(T5Config(vocabulary=t5_vocabulary, **T5_SIZES))
        for encoder in (self.clip_l, self.clip_g, self.t5):
            initialise(encoder)

    def forward(self, ids: LongTensor) -> tuple[list[Tensor], list[Tensor]]:
        """ids [B, 3, LENGTH] -> token states of CLIP-L, bigG, T5 [B, LENGTH, width] and pooled of the first two."""
        text_l, pooled_l = self.clip_l(ids[:, 0])
        text_g, pooled_g = self.clip_g(ids[:, 1])
        return [text_l, text_g, self.t5(ids[:, 2])], [pooled_l, pooled_g]


def initialise(encoder: nn.Module) -> None:
    """Token embeddings of size 0.5 (T5: 1), positions of 0.1 (T5: 1, all that it knows of order), linear layers by fan-in."""
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.endswith("SelfAttention.q"):
                nn.init.normal_(module.weight, std=(module.in_features * T5_SIZES["head_width"]) ** -0.5)
            if name.endswith(("out_proj", "fc2", "SelfAttention.o", "DenseReluDense.wo")):
                module.weight.data.mul_(0.4)
        elif isinstance(module, nn.Embedding):
            scale = 0.1 if "position" in name else 0.5 if "token" in name else 1.0
            nn.init.normal_(module.weight, std=scale)


class Reader(nn.Module):
    """Answers every question from one sequence of token states (one learned attention a question) or one pooled state."""

    def __init__(self, width: int):
        super().__init__()
        self.queries = nn.Linear(width, len(ANSWERS))
        self.answers = nn.ModuleList(nn.Linear(width, len(answers)) for answers in ANSWERS.values())

    def forward(self, states: Tensor) -> list[Tensor]:
        """states [B, L, width] -> logits per question, each [B, answers]."""
        weights = self.queries(states).softmax(dim=1)  # [B, L, questions]
        read = torch.einsum("blq,blc->qbc", weights, states)
        return [answer(of_question) for answer, of_question in zip(self.answers, read)]


class Lesson(nn.Module):
    """The encoders with a reader for each thing that a denoiser sees of them."""

    def __init__(self, encoders: TextEncoders):
        super().__init__()
        self.encoders = encoders
        clip, t5 = CLIP_SIZES["width"], T5_SIZES["width"]
        self.readers = nn.ModuleList(Reader(width) for width in (clip, clip, t5, clip, clip))

    def forward(self, ids: LongTensor) -> list[list[Tensor]]:
        """ids [B, 3, LENGTH] -> logits per source and question."""
        sequences, pooled = self.encoders(ids)
        return [
            reader(states)
            for reader, states in zip(self.readers, [*sequences, *(p[:, None] for p in pooled)])
        ]


def truth(scene: Scene) -> list[int]:
    """The right answer to every question, as a number."""
    objects = sorted(
        scene.objects, key=lambda item: item.x if RELATIONS.get(scene.relation, (0, 0))[0] else item.y
    )
    arrangement = "single" if scene.relation is None else "row" if RELATIONS[scene.relation][0] else "column"
    facts = {"background": scene.background, "arrangement": arrangement}
    for place, item in zip(("first", "second"), [*objects, None][:2]):
        for what in ("colour", "shape", "size"):
            facts[f"{place} {what}"] = getattr(item, what) if item else NOTHING
    return [answers.index(facts[question]) for question, answers in ANSWERS.items()]


def said(split: str, index: int) -> str:
    """The caption that training uses for a scene: in one case of ten only a hint of it."""
    scene, caption = sample(split, index)
    rng = random.Random(f"{split}/{index}/said")
    return hint(scene, rng) if rng.random() < 0.1 else caption


@cache
def tokenizers_in(folder: Path) -> list[Callable[[str], Tensor]]:
    """The tokenizers of CLIP-L, bigG and T5, read once."""
    files = folder / "vocab.json", folder / "merges.txt"
    clip_l, clip_g = (CLIPTokenizer.from_files(*files, LENGTH, pad) for pad in (None, 0))
    return [clip_l, clip_g, T5Tokenizer(folder / "spiece.model", LENGTH)]


def tokens(captions: list[str], folder: Path) -> Tensor:
    """Token ids of all text encoders: [N, 3, LENGTH] (CLIP-L, bigG, T5)."""
    return torch.stack([torch.cat([encode(text) for encode in tokenizers_in(folder)]) for text in captions])


@torch.no_grad()
def accuracy(lesson: Lesson, folder: Path, count: int = 512) -> dict[str, list[float]]:
    """Share of right answers per question, one figure a source, over unseen full captions that say the relation."""
    drawn = [sample("test", index) for index in range(2 * count)]
    drawn = [(scene, text) for scene, text in drawn if " and " not in text][:count]
    right = torch.tensor([truth(scene) for scene, _ in drawn]).T  # [questions, N]
    device = next(lesson.parameters()).device
    logits = lesson(tokens([text for _, text in drawn], folder).to(device))
    return {
        question: [
            (of_source[number].argmax(1).cpu() == right[number]).float().mean().item() for of_source in logits
        ]
        for number, question in enumerate(ANSWERS)
    }


def train_text_encoders(
    encoders: TextEncoders, folder: Path, out: Path, device: torch.device, compiled: bool
) -> None:
    """Trains (or resumes, or just loads) the encoders in place and freezes them; `folder` holds the tokenizers."""
    torch.manual_seed(0)
    lesson = Lesson(encoders).to(device)
    run = Run(
        lesson, PLAN, out / "text-encoders.safetensors", digest(*(folder / name for name in FILES)), compiled
    )
    answer = torch.compile(lesson) if compiled else lesson

    def loss_of(generator: torch.Generator, step: int) -> Tensor:
        numbers = torch.randint(2**31, (PLAN.batch,), generator=generator).tolist()
        right = torch.tensor([truth(sample("train", number)[0]) for number in numbers], device=device)
        ids = tokens([said("train", number) for number in numbers], folder).to(device)
        with run.half_precision():
            logits = answer(ids)
        return (
            sum(
                F.cross_entropy(of_question.float(), right[:, number])
                for of_source in logits
                for number, of_question in enumerate(of_source)
            )
            / len(logits)
            / len(ANSWERS)
        )

    def show() -> None:
        for question, shares in accuracy(lesson, folder).items():
            print(f"  {question:14}", *(f"{share:6.1%}" for share in shares), flush=True)

    run.fit(loss_of, show, show_every=1000)
    run.use_average()
    lesson.eval().requires_grad_(False)
