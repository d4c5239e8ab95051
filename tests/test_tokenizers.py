"""Tokenizers against transformers on a few hundred seeded strings; every comparison of ids is `equal`."""

import io
import json
import random
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from models.tokenizers import CLIPTokenizer, T5Tokenizer

WORDS = (
    r"a photo of the quick brown fox's isn't we'LL THEY'VE 'S 't 1234 42nd 3.14 ! !! ?! ... # #version </w> <|end _"
).split() + [
    # case: Angstrom, dotted I, titlecase Dz, sharp s
    "\u00c5NGSTR\u00d6M", "\u0130stanbul", "\u01c5", "\u00df", "\u1e9e",
    "caf\u00e9", "cafe\u0301", "A\u030a",  # composed and decomposed
    # Greek, Arabic, Japanese
    "\u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2", "\u0627\u0644\u062e\u0637", "\u65e5\u672c\u8a9e",
    "\u0928\u092e\u0938\u094d\u0924\u0947",  # Devanagari: marks that have no composed form
    # family, flag, skin tone
    "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\U0001f44d\U0001f3fd",
    # one half, roman 8, squared, fi, wide !, T5's space
    "\u00bd", "\u2167", "\u00b2", "\ufb01ne", "\uff01", "\u2581",
]
SPACES = [" ", " ", " ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u200b", "\u2028", "\x0b", "\ufeff", ""]
FIXED = ["", " ", "!", "! a !", "\n", "a", "a photo of a cat", "word " * 500, "x" * 3000, "\U0001f44d" * 200]
CLIP_WORDS = WORDS + ["<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "o\u0302\u0323", "\x85", "\u200d", "\x00"]


def random_character(rng: random.Random) -> str:
    """Any assigned code point, low ones more often."""
    while True:
        character = chr(rng.randrange(1, rng.choice([0x80, 0x300, 0x3000, 0x20000])))
        if unicodedata.category(character) not in ("Cn", "Cs"):
            return character


def is_plain(character: str) -> bool:
    """Not a mark, joiner or Hangul vowel, which would join the character before it, and no control character."""
    joins = unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf", "Cc", "Sk") or "\u1160" <= character <= "\u11ff"
    return not joins


def strings(words: list[str], plain: bool, count: int = 400) -> Iterator[str]:
    """The fixed strings, then words and odd white space, then words glued to random characters."""
    rng = random.Random(0)
    yield from FIXED
    for _ in range(count // 2):
        yield "".join(rng.choice(words) + rng.choice(SPACES) for _ in range(rng.randrange(60)))
    for _ in range(count // 2):
        characters = [random_character(rng) for _ in range(rng.randrange(80))]
        parts = [c for c in characters if is_plain(c) or not plain] + rng.choices(words, k=5) + rng.choices(SPACES, k=5)
        rng.shuffle(parts)
        yield "".join(parts)


def sentences() -> list[str]:
    """Training text of the small vocabularies."""
    rng = random.Random(1)
    return [" ".join(rng.choices(WORDS, k=8)) for _ in range(1000)]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP vocabulary in CLIP's order: byte symbols, the same + </w>, merges, the two special tokens."""
    tokenizer = Tokenizer(BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = BpeTrainer(vocab_size=900, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator((s.lower() for s in sentences()), trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = symbols + [s + "</w>" for s in symbols] + ["".join(merge) for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]

    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(dict.fromkeys(tokens))}))
    lines = ["#version: 0.2"] + [" ".join(merge) for merge in merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def t5_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SentencePiece unigram model with T5's settings: pad 0, end 1, unknown 2, nmt_nfkc."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()), model_writer=model, model_type="unigram", vocab_size=200, pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )
    path = tmp_path_factory.mktemp("t5") / "spiece.model"
    path.write_bytes(model.getvalue())
    return path


def protobuf_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a serialized protobuf message; spares the test a dependency on protobuf."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = data[at], at + 1
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        size = {0: 0, 1: 8, 5: 4}.get(key & 7)  # wire types: varint, 64 bit, 32 bit; else length-delimited
        if size == 0:
            yield key >> 3, varint()
            continue
        size = varint() if size is None else size
        at += size
        yield key >> 3, data[at - size:at]


def t5_oracle(model_file: Path) -> transformers.PreTrainedTokenizerBase:
    """transformers' T5 tokenizer: 4 takes the file, 5 its pieces and its rules (field 2 of field 3)."""
    if transformers.__version__.startswith("4."):
        return transformers.T5Tokenizer(str(model_file))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.get_piece_size())]
    rules = dict(protobuf_fields(dict(protobuf_fields(model_file.read_bytes()))[3]))
    return transformers.T5Tokenizer(vocab=pieces, _spm_precompiled_charsmap=rules[2])


@pytest.mark.parametrize("length", [77, 16])
def test_clip_ids_equal_transformers(clip_folder: Path, length: int):
    theirs = transformers.CLIPTokenizerFast.from_pretrained(clip_folder)
    ours = CLIPTokenizer(clip_folder / "vocab.json", clip_folder / "merges.txt", length=length)
    for text in strings(CLIP_WORDS, plain=False):
        expected = theirs(text, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
        assert torch.equal(ours(text), expected), ascii(text)


def test_clip_start_end_and_pad(clip_folder: Path):
    files = clip_folder / "vocab.json", clip_folder / "merges.txt"
    start, end = (json.loads(files[0].read_text())[token] for token in ("<|startoftext|>", "<|endoftext|>"))
    assert CLIPTokenizer(*files, length=5)("").tolist() == [[start, end, end, end, end]]
    assert CLIPTokenizer(*files, length=5, pad=0)("").tolist() == [[start, end, 0, 0, 0]]
    long = CLIPTokenizer(*files)("word " * 500)
    assert long.shape == (1, 77) and long.dtype == torch.int64 and long[0, -1] == end and long.argmax() == 76


@pytest.mark.parametrize("length", [77, 16])
def test_t5_ids_equal_transformers(t5_file: Path, length: int):
    """Plain characters only, for the reason in the docstring of T5Tokenizer."""
    theirs, ours = t5_oracle(t5_file), T5Tokenizer(t5_file, length=length)
    for text in strings(WORDS, plain=True):
        expected = theirs(text, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
        assert torch.equal(ours(text), expected), ascii(text)


def test_t5_end_and_pad(t5_file: Path):
    tokenizer = T5Tokenizer(t5_file, length=256)
    assert tokenizer("").tolist() == [[1] + [0] * 255]
    ids = tokenizer("word " * 500)
    assert ids.shape == (1, 256) and ids.dtype == torch.int64 and ids[0, -1] == 1 and (ids[0, :-1] > 1).all()
