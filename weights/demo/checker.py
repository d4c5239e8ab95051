"""Looks at a 128x128 picture and says which scene it shows; compares that with what a caption asked for.

No network: pixels that are not the background's colour form connected regions, a region's colour is the one that its inside has,
its shape the one whose outline covers it best, its size the radius that its area implies. Regions below 40 pixels do not count.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from weights.demo.scenes import COLOURS, RELATIONS, SHAPES, SIZES, Object, Scene, distance, pixel_centres

PALETTE = torch.tensor([COLOURS[name] for name in COLOURS]) / 127.5 - 1  # [colours, 3]
LEAST = 40  # pixels of a region that counts as an object
OVERLAP = 0.75  # intersection over union from which on a region has a shape
ONE_COLOUR = 0.8  # share of the inside from which on a region has a colour
BORDER = (SIZES["small"][1] + SIZES["large"][0]) / 2  # radius between small and large
QUESTIONS = ("background", "number", "colour", "shape", "size", "relation")


def common_colour(values: Tensor) -> str:
    """The name of the palette colour to which most of the values [N, 3] are nearest; "?" where those are not enough."""
    votes = (values[:, None] - PALETTE).square().sum(dim=2).argmin(dim=1).bincount(minlength=len(PALETTE))
    return list(COLOURS)[int(votes.argmax())] if votes.max() >= ONE_COLOUR * len(values) else "?"


def regions(mask: Tensor) -> list[Tensor]:
    """Connected regions (8 neighbours) of a mask [H, W], each a mask, those below LEAST pixels left out."""
    labels = torch.arange(1, mask.numel() + 1).view(mask.shape) * mask
    while True:
        grown = F.max_pool2d(labels[None, None].double(), 3, stride=1, padding=1)[0, 0].long() * mask
        if torch.equal(grown, labels):
            break
        labels = grown
    found, counts = labels[mask].unique(return_counts=True)
    return [labels == label for label, count in zip(found, counts) if count >= LEAST]


def outline(shape: str, x: float, y: float, radius: float, side: int) -> Tensor:
    """The shape as a mask [side, side]."""
    across, down = pixel_centres(side)
    return distance(shape, across - x, down - y, radius) < 0


AREAS = {
    shape: outline(shape, 0.5, 0.5, 0.25, 512).double().mean().item() / 0.25**2 for shape in SHAPES
}  # per radius^2


def describe_region(region: Tensor, image: Tensor) -> Object:
    """One region of an image [3, H, W] in [-1, 1] as an object; its shape is "?" if no outline covers it well, its colour if it has several."""
    side, area = image.shape[-1], region.double().mean().item()
    rows, columns = region.nonzero().double().add(0.5).div(side).mean(dim=0).tolist()
    best = (0.0, "?", (area / 3) ** 0.5)
    for shape in SHAPES:
        radius = (area / AREAS[shape]) ** 0.5
        drawn = outline(shape, columns, rows, radius, side)
        overlap = ((drawn & region).sum() / (drawn | region).sum()).item()
        best = max(best, (overlap, shape, radius))
    overlap, shape, radius = best
    inner = (
        F.max_pool2d((~region)[None, None].double(), 3, stride=1, padding=1)[0, 0] == 0
    )  # without the soft edge
    colour = common_colour(image[:, inner if inner.sum() >= 8 else region].T)
    return Object(
        colour,
        shape if overlap >= OVERLAP else "?",
        "small" if radius < BORDER else "large",
        columns,
        rows,
        radius,
    )


def look(image: Tensor) -> tuple[str, list[Object]]:
    """The background's colour and the objects of an image [3, H, W] in [-1, 1]."""
    frame = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], dim=1).T  # [4 side, 3]
    background = common_colour(frame)
    away = (image - frame.median(dim=0).values[:, None, None]).square().sum(dim=0).sqrt()
    return background, [describe_region(region, image) for region in regions(away > 0.35)]


def compare(scene: Scene, caption: str, image: Tensor) -> dict[str, bool | None]:
    """What of the scene is right in the image, by question; None where the caption leaves it open.

    An attribute is right if it is right for every object; objects are paired in the way that gets the most right.
    """
    background, seen = look(image)
    words = caption.split()
    asks_size = any(word in words for word in ("large", "big", "small", "little"))
    asks_relation = scene.relation is not None and " and " not in caption
    asked = ["colour", "shape", *["size"] * asks_size, *["relation"] * asks_relation]
    verdict: dict[str, bool | None] = dict.fromkeys(QUESTIONS, False)
    verdict["background"] = background == scene.background
    verdict["number"] = len(seen) == len(scene.objects)
    if verdict["number"]:
        orders = [seen] if len(seen) == 1 else [seen, seen[::-1]]
        verdict |= max(
            (_attributes(scene, order) for order in orders),
            key=lambda right: (right["colour"], sum(right[what] for what in asked)),
        )
    if not asks_size:
        verdict["size"] = None
    if not asks_relation:
        verdict["relation"] = None
    return verdict


def _attributes(scene: Scene, seen: list[Object]) -> dict[str, bool]:
    """Colour, shape, size and relation, if the objects seen are the scene's in this order."""
    right = {
        what: all(getattr(a, what) == getattr(b, what) for a, b in zip(scene.objects, seen))
        for what in ("colour", "shape", "size")
    }
    right["relation"] = True
    if scene.relation:
        dx, dy = RELATIONS[scene.relation]
        along = (seen[0].x - seen[1].x) * dx + (seen[0].y - seen[1].y) * dy
        across = abs((seen[0].x - seen[1].x) * dy) + abs((seen[0].y - seen[1].y) * dx)
        right["relation"] = along > across
    return right


def shares(verdicts: list[dict[str, bool | None]]) -> dict[str, float | None]:
    """Share right per question among the captions that ask it, and of pictures with everything right; None where there is none."""
    table = {}
    for question in QUESTIONS:
        asked = [verdict[question] for verdict in verdicts if verdict[question] is not None]
        table[question] = sum(asked) / len(asked) if asked else None
    all_right = [all(right is not False for right in verdict.values()) for verdict in verdicts]
    table["everything"] = sum(all_right) / len(all_right) if all_right else None
    return table


def percent(share: float | None) -> str:
    """A share in words."""
    return "" if share is None else f"{share:.1%}"
