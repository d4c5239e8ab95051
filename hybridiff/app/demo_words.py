"""Which words the demo checkpoints know, those of their captions (weights/demo/scenes.py), and what is said of a prompt with others."""

from collections.abc import Iterable
from unicodedata import category

from hybridiff.errors import printable
from weights.demo.scenes import COLOURS, RELATIONS, SHAPES, SIZES, SYNONYMS

NAMES = (*SIZES, *COLOURS, *SHAPES, *RELATIONS, "background")
OTHERS = tuple(other for name in NAMES for other in SYNONYMS.get(name, ()))
KNOWN = frozenset(" ".join((*NAMES, *OTHERS, "a an and on with")).split())


def unknown(text: str) -> list[str]:
    """The words of a text that no caption has, each once: runs of letters, digits and pictographs."""
    plain = "".join(c if category(c)[0] in "LMN" or category(c) == "So" else " " for c in text)
    return list(dict.fromkeys(word for word in plain.split() if word.casefold() not in KNOWN))


def remarks_on(texts: Iterable[str | None], own_prompt: str | None) -> list[str]:
    """A line for each text with words that a demo does not know, and one with those that it does.

    `own_prompt`: what the checkpoint proposes. Only a demo proposes one, of nothing but these words; of others nothing is said.
    """
    if not own_prompt or unknown(own_prompt):
        return []
    lines = [
        f'"{printable(text, 60)}": the demo does not know {printable(", ".join(words), 200)}, and draws some shapes all the same'
        for text in dict.fromkeys(texts)
        if text and (words := unknown(text))
    ]
    return lines and [*lines, f"the demo knows {', '.join(NAMES)}; also {', '.join(OTHERS)}"]
