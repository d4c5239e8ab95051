"""The demo training data: seeded, in the frame, apart, described truly, and covered by the committed tokenizers."""

import filecmp
from pathlib import Path

import pytest
import sentencepiece
import torch

from models.tokenizers import CLIPTokenizer, T5Tokenizer
from weights.demo import tokenizers
from weights.demo.scenes import COLOURS, REACH, RELATIONS, SHAPES, Object, Scene, distance, render, sample

DEMO = Path(tokenizers.__file__).parent
SCENES = [sample("check", index) for index in range(300)]


def test_same_seed_same_scene():
    """Equal: scene, caption and picture; other splits and numbers differ."""
    scene, caption = sample("check", 7)
    again, caption_again = sample("check", 7)
    assert scene == again and caption == caption_again
    assert torch.equal(render(scene, 32), render(again, 32))
    assert scene != sample("check", 8)[0] and scene != sample("train", 7)[0]


def test_objects_are_inside_apart_and_placed_as_the_relation_says():
    for scene, _ in SCENES:
        for item in scene.objects:
            assert all(REACH * item.radius <= place <= 1 - REACH * item.radius for place in (item.x, item.y))
        assert len({scene.background, *(item.colour for item in scene.objects)}) == 1 + len(scene.objects)
        if scene.relation:
            first, second = scene.objects
            dx, dy = RELATIONS[scene.relation]
            along = (first.x - second.x) * dx + (first.y - second.y) * dy
            assert along >= REACH * (first.radius + second.radius) - 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_render_paints_the_colours(shape):
    """Equal inside the shape and in the corner: flat colours, soft only at the edge."""
    picture = render(Scene("blue", (Object("red", shape, "large", 0.5, 0.5, 0.2),)), 64)
    red, blue = (torch.tensor(COLOURS[name]) / 127.5 - 1 for name in ("red", "blue"))
    inside = (32, 42) if shape == "ring" else (32, 32)
    assert picture.shape == (3, 64, 64)
    assert torch.equal(picture[:, inside[0], inside[1]], red) and torch.equal(picture[:, 0, 0], blue)


def words_of(caption: str) -> list[str]:
    """The words of a caption, commas among them."""
    return caption.replace(",", " ,").split()


def pieces(t5: T5Tokenizer, caption: str) -> int:
    """How many tokens come before the end."""
    return int((t5(caption) == 1).int().argmax())


def test_captions_name_what_is_there_and_fit_the_encoders():
    """Every caption fits 24 positions of each encoder, one token a word."""
    clip = CLIPTokenizer.from_files(DEMO / "vocab.json", DEMO / "merges.txt", 24)
    t5 = T5Tokenizer(DEMO / "spiece.model", 24)
    for scene, caption in SCENES:
        words = words_of(caption)
        said = {"violet": "purple", "turquoise": "cyan"}
        named = {said.get(word, word) for word in words}
        assert {scene.background, *(item.colour for item in scene.objects)} <= named
        assert int((clip(caption) == clip.end).int().argmax()) == len(words) + 1  # start token first
        assert pieces(t5, caption) == len(words)


def test_tokenizer_files_are_reproduced(tmp_path):
    """Equal: the committed files are what the script writes, spiece.model where sentencepiece is the version that made it; by any version it makes each word one piece."""
    tokenizers.write_all(tmp_path)
    same = ("vocab.json", "merges.txt") + (("spiece.model",) if sentencepiece.__version__ == "0.2.3" else ())
    for name in same:
        assert filecmp.cmp(tmp_path / name, DEMO / name, shallow=False), name
    t5 = T5Tokenizer(tmp_path / "spiece.model", 24)
    for _, caption in SCENES:
        assert pieces(t5, caption) == len(words_of(caption))


def test_unknown_shape():
    with pytest.raises(ValueError, match="hexagon"):
        distance("hexagon", torch.zeros(1), torch.zeros(1), 0.1)
