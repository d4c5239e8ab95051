"""The checker of demo pictures on pictures whose truth is known, and what the demo's text encoders are asked."""

import random

import pytest
import torch

from weights.demo.checker import compare, look, shares
from weights.demo.scenes import COLOURS, SHAPES, Object, Scene, hint, render, sample
from weights.demo.text_encoders import ANSWERS, truth

DRAWN = [sample("checker", index) for index in range(100)]


def test_rendered_scenes_are_right_and_others_are_not():
    """Every question at least 99% right on the scene itself; with the next scene's picture hardly ever all right."""
    own = shares([compare(scene, caption, render(scene)) for scene, caption in DRAWN])
    assert min(own.values()) >= 0.99
    other = shares([compare(*asked, render(shown[0])) for asked, shown in zip(DRAWN, DRAWN[1:])])
    assert other["everything"] == 0 and other["background"] < 0.3 and other["colour"] < 0.2


def test_noise_and_blur_do_not_fool_it():
    """What a decoder does to a picture: soft edges and a little noise."""
    generator = torch.Generator().manual_seed(0)
    verdicts = []
    for scene, caption in DRAWN[:40]:
        soft = torch.nn.functional.avg_pool2d(
            render(scene)[None], 3, stride=1, padding=1, count_include_pad=False
        )[0]
        verdicts.append(compare(scene, caption, soft + 0.03 * torch.randn(soft.shape, generator=generator)))
    assert min(shares(verdicts).values()) >= 0.95


@pytest.mark.parametrize("change", ["colour", "shape", "size", "background"])
def test_one_wrong_thing_is_found(change):
    item = Object("red", "circle", "large", 0.4, 0.5, 0.2)
    asked = Scene("white", (item,))
    wrong = {
        "colour": Object("blue", "circle", "large", 0.4, 0.5, 0.2),
        "shape": Object("red", "square", "large", 0.4, 0.5, 0.2),
        "size": Object("red", "circle", "small", 0.4, 0.5, 0.12),
        "background": item,
    }[change]
    shown = Scene("black" if change == "background" else "white", (wrong,))
    verdict = compare(asked, "a large red circle on a white background", render(shown))
    assert [question for question, right in verdict.items() if right is False] == [change]


def test_a_smear_has_no_shape_and_a_blank_picture_no_object():
    blank = render(Scene("white", ()))
    assert look(blank) == ("white", [])
    smear = blank.clone()
    smear[:, 60:66, 20:100] = -1
    assert [item.shape for item in look(smear)[1]] == ["?"]


def test_a_thing_of_two_colours_has_none():
    picture = render(Scene("white", (Object("red", "square", "large", 0.5, 0.5, 0.2),)))
    assert [item.colour for item in look(picture)[1]] == ["red"]
    picture[:, :58] = render(Scene("white", (Object("blue", "square", "large", 0.5, 0.5, 0.2),)))[:, :58]
    assert [(item.colour, item.shape) for item in look(picture)[1]] == [("?", "square")]


def test_truth_goes_by_place():
    """The first object is the left or upper one, whichever the caption names first."""
    left, right = (
        Object("red", "ring", "small", 0.2, 0.5, 0.1),
        Object("blue", "star", "large", 0.7, 0.5, 0.2),
    )
    answers = [
        truth(Scene("white", pair, name))
        for pair, name in (((left, right), "left of"), ((right, left), "right of"))
    ]
    assert answers[0] == answers[1]
    said = {question: names[number] for (question, names), number in zip(ANSWERS.items(), answers[0])}
    assert said["arrangement"] == "row" and said["first shape"] == "ring" and said["second colour"] == "blue"


def test_hints_name_only_what_is_there():
    rng = random.Random(0)
    for scene, _ in DRAWN:
        words = set(hint(scene, rng).split())
        there = {
            scene.background,
            *(item.colour for item in scene.objects),
            *(item.shape for item in scene.objects),
        }
        assert words & (set(COLOURS) | set(SHAPES)) <= there and words
