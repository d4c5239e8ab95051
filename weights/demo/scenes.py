"""Procedural training data of the demo checkpoints: one or two flat shapes on a plain background, and a caption.

A `Scene` is plain data (names and numbers); `render` turns it into a picture and `caption` into a sentence. The same
seed always gives the same scene, picture and words. Lengths are in units of the picture's side.
"""

import math
import random
from dataclasses import dataclass

import torch

COLOURS = {  # name: RGB 0..255
    "red": (214, 32, 38),
    "orange": (255, 140, 0),
    "yellow": (250, 222, 40),
    "green": (30, 148, 58),
    "cyan": (64, 214, 222),
    "blue": (30, 64, 205),
    "purple": (128, 40, 160),
    "pink": (255, 158, 200),
    "white": (248, 248, 248),
    "black": (16, 16, 16),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": (0.110, 0.125), "large": (0.185, 0.205)}  # range of the radius
RELATIONS = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}  # where the first object is
SYNONYMS = {
    "large": ("big",),
    "small": ("little",),
    "circle": ("disk",),
    "ring": ("hoop",),
    "purple": ("violet",),
    "cyan": ("turquoise",),
    "left of": ("to the left of",),
    "right of": ("to the right of",),
    "above": ("over",),
    "below": ("under", "beneath"),
    "background": ("backdrop",),
}
REACH = 1.2  # the farthest point of any shape, in radii


@dataclass(frozen=True)
class Object:
    """One shape: names of colour, shape and size, centre (x right, y down) and radius as fractions of the side."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A background colour, the objects, and for two objects where the first stands as seen from the second."""

    background: str
    objects: tuple[Object, ...]
    relation: str | None = None


def scene(rng: random.Random) -> Scene:
    """Draws a scene: 40% one object, 60% two; no two of background and objects share a colour."""
    count = 1 if rng.random() < 0.4 else 2
    background, *colours = rng.sample(sorted(COLOURS), count + 1)
    relation = rng.choice(sorted(RELATIONS)) if count == 2 else None
    objects = []
    for place, colour in enumerate(colours):
        size = rng.choice(sorted(SIZES))
        radius = rng.uniform(*SIZES[size])
        margin = REACH * radius + 0.01
        centre = [0.5 + min(0.14, 0.5 - margin) * rng.uniform(-1, 1) for _ in range(2)]
        if relation:  # along the axis of the relation each object keeps to its own half of the picture
            axis = 0 if RELATIONS[relation][0] else 1
            first_half = (RELATIONS[relation][axis] < 0) == (place == 0)
            along = rng.uniform(min(margin, 0.25), max(0.5 - margin, 0.25))
            centre[axis] = along if first_half else 1 - along
        objects.append(Object(colour, rng.choice(SHAPES), size, *centre, radius))
    return Scene(background, tuple(objects), relation)


def distance(shape: str, x: torch.Tensor, y: torch.Tensor, radius: float) -> torch.Tensor:
    """Signed distance to the outline, negative inside (exact near the edges, which is all that anti-aliasing needs)."""
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88 * radius
    if shape == "triangle":  # three half planes around the centroid, tip up
        sides = [math.radians(angle) for angle in (90, 210, 330)]
        planes = torch.stack([x * math.cos(side) + y * math.sin(side) for side in sides])
        return planes.amax(0) - 0.6 * radius
    if shape == "star":  # fold the angle into half of one of five arms, then one half plane
        angle = torch.atan2(x, -y)
        folded = (torch.remainder(angle + math.pi / 5, 2 * math.pi / 5) - math.pi / 5).abs()
        length = torch.hypot(x, y)
        along, across = length * folded.cos(), length * folded.sin()
        tip, notch = REACH * radius, 0.5 * REACH * radius
        notch_along, notch_across = notch * math.cos(math.pi / 5), notch * math.sin(math.pi / 5)
        normal = (notch_across, tip - notch_along)
        return ((along - tip) * normal[0] + across * normal[1]) / math.hypot(*normal)
    if shape == "cross":
        long, thin = radius, 0.34 * radius
        upright = torch.maximum(x.abs() - thin, y.abs() - long)
        return torch.minimum(upright, torch.maximum(x.abs() - long, y.abs() - thin))
    if shape == "ring":
        return (torch.hypot(x, y) - 0.78 * radius).abs() - 0.24 * radius
    raise ValueError(f"got shape {shape!r}, expected one of {', '.join(SHAPES)}")


def pixel_centres(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y of the centre of every pixel, as fractions of the side: each [side, side]."""
    centres = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return x, y


def render(scene: Scene, side: int = 128) -> torch.Tensor:
    """Draws a scene with anti-aliased edges: float32 [3, side, side] in [-1, 1]."""
    x, y = pixel_centres(side)
    image = _rgb(scene.background).expand(3, side, side)
    for item in scene.objects:
        edge = distance(item.shape, x - item.x, y - item.y, item.radius) * side
        coverage = (0.5 - edge).clamp(0, 1)
        image = image + coverage * (_rgb(item.colour) - image)
    return image


def caption(scene: Scene, rng: random.Random) -> str:
    """Describes a scene in English; sometimes leaves out sizes or the relation, uses synonyms or another word order."""
    drop_size = rng.random() < 0.15
    nouns = []
    for item in scene.objects:
        words = [_say(name, rng) for name in (item.size, item.colour, item.shape)]
        nouns.append(_article(" ".join(words[1:] if drop_size else words)))
    middle = _say(scene.relation, rng) if scene.relation and rng.random() < 0.92 else "and"
    subject = f" {middle} ".join(nouns)
    ground = _article(f"{_say(scene.background, rng)} {_say('background', rng)}")
    order = rng.random()
    if order < 0.80:
        return f"{subject} on {ground}"
    if order < 0.88:
        return f"{subject}, {ground.split(' ', 1)[1]}"
    if order < 0.94:
        return f"{ground} with {subject}"
    return f"on {ground}, {subject}"


def hint(scene: Scene, rng: random.Random) -> str:
    """Says only a part of the scene: one object, its shape or its colour, or the background."""
    item = rng.choice(scene.objects)
    ground = f"{_say(scene.background, rng)} {_say('background', rng)}"
    size, colour, shape = (_say(name, rng) for name in (item.size, item.colour, item.shape))
    noun = rng.choice([f"{size} {colour} {shape}", f"{colour} {shape}", shape, colour])
    return rng.choice(
        [noun, _article(noun), ground, _article(ground), f"{_article(noun)} on {_article(ground)}"]
    )


def sample(split: str, index: int) -> tuple[Scene, str]:
    """The scene and caption number `index` of a split (a name such as "train" or "test": splits share no seeds)."""
    rng = random.Random(f"{split}/{index}")
    drawn = scene(rng)
    return drawn, caption(drawn, rng)


def _rgb(colour: str) -> torch.Tensor:
    """The colour as [3, 1, 1] in [-1, 1]."""
    return torch.tensor(COLOURS[colour]).view(3, 1, 1) / 127.5 - 1


def _say(word: str, rng: random.Random) -> str:
    """The word itself, or in one case of ten a synonym where there is one."""
    return rng.choice(SYNONYMS[word]) if word in SYNONYMS and rng.random() < 0.1 else word


def _article(noun: str) -> str:
    """The noun with "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
