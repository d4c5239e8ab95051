"""Tokenizers against transformers on thousands of strings; every comparison of ids is `equal`.

benchmarks/quality/tokenizer_ids.py does the same with as many seeded strings as one likes.
"""

import io
import json
import random
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from models.clip import CLIPConfig
from models.tokenizers import CLIPTokenizer, T5Tokenizer, character_map
from weights.find import DEMO_FOLDER
from weights.tokenizers import T5_EXTRA, clip_tokenizer, packed_clip

WORDS = (
    r"a photo of the quick brown fox's isn't we'LL THEY'VE 'S 't 1234 42nd 3.14 ! !! ?! ... # #version </w> <|end _"
).split() + [
    # case: Angstrom, dotted I, titlecase Dz, sharp s
    "\u00c5NGSTR\u00d6M",
    "\u0130stanbul",
    "\u01c5",
    "\u00df",
    "\u1e9e",
    "caf\u00e9",
    "cafe\u0301",
    "A\u030a",  # composed and decomposed
    # Greek, Arabic, Japanese
    "\u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2",
    "\u0627\u0644\u062e\u0637",
    "\u65e5\u672c\u8a9e",
    "\u0928\u092e\u0938\u094d\u0924\u0947",  # Devanagari: marks that have no composed form
    # family, flag, skin tone
    "\U0001f469\u200d\U0001f469\u200d\U0001f467",
    "\U0001f1e9\U0001f1ea",
    "\U0001f44d\U0001f3fd",
    # one half, roman 8, squared, fi, wide !, T5's space
    "\u00bd",
    "\u2167",
    "\u00b2",
    "\ufb01ne",
    "\uff01",
    "\u2581",
]
SPACES = [
    " ",
    " ",
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\u00a0",
    "\u3000",
    "\u200b",
    "\u2028",
    "\x0b",
    "\ufeff",
    "",
]
FIXED = ["", " ", "!", "! a !", "\n", "a", "a photo of a cat", "word " * 500, "x" * 3000, "\U0001f44d" * 200]
WORDS += ["o\u0302\u0323", "\x85", "\u200d", "\x00", "\u1100\u1161\u11a8", "\u0e01\u0e33",
          "a\u0301\u0323\u0308\u200d"]  # fmt: skip
WORDS += ["<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "</s>", "<pad>", "<unk>", "<s>", "</S>", "<extra_id_0>",
          "<extra_id_99>", "<extra_id_100>"]  # fmt: skip


def random_character(rng: random.Random) -> str:
    """Any assigned code point, low ones more often."""
    while True:
        character = chr(rng.randrange(1, rng.choice([0x80, 0x300, 0x3000, 0x20000])))
        if unicodedata.category(character) not in ("Cn", "Cs"):
            return character


def strings(count: int, seed: int = 0) -> Iterator[str]:
    """The fixed strings, then words and odd white space, then words glued to random characters, marks and joiners."""
    rng = random.Random(seed)
    yield from FIXED
    for _ in range((count - len(FIXED)) // 2):
        yield "".join(rng.choice(WORDS) + rng.choice(SPACES) for _ in range(rng.randrange(40)))
    for _ in range((count - len(FIXED) + 1) // 2):
        parts = [random_character(rng) for _ in range(rng.randrange(60))] + rng.choices(WORDS + SPACES, k=10)
        rng.shuffle(parts)
        yield "".join(parts)


PIECES = st.sampled_from(WORDS + SPACES)
CHARACTERS = st.characters(exclude_categories=("Cn", "Cs"))
TEXTS = st.lists(
    st.lists(PIECES | CHARACTERS, max_size=40).map("".join), min_size=10, max_size=40
)  # compared at once


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
    (folder / "vocab.json").write_text(
        json.dumps({token: i for i, token in enumerate(dict.fromkeys(tokens))})
    )
    lines = ["#version: 0.2"] + [" ".join(merge) for merge in merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def t5_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SentencePiece unigram model with T5's settings: pad 0, end 1, unknown 2, nmt_nfkc."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()),
        model_writer=model,
        model_type="unigram",
        vocab_size=200,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("t5") / "spiece.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def real_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's own vocabulary, as the two files that transformers reads."""
    return write_clip(tmp_path_factory.mktemp("real"))


def write_clip(folder: Path) -> Path:
    """Unpacks CLIP's own vocabulary into vocab.json and merges.txt."""
    vocabulary, merges = packed_clip()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2"] + [" ".join(merge) for merge in merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def t5_oracle(model_file: Path, extra_ids: int = 0) -> transformers.PreTrainedTokenizerBase:
    """transformers' T5 tokenizer: 4 takes the file, 5 its pieces (and extra tokens after them) and its rules."""
    if transformers.__version__.startswith("4."):
        return transformers.T5TokenizerFast(str(model_file), extra_ids=extra_ids)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.get_piece_size())]
    extra = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(extra_ids))]
    rules = character_map(model_file.read_bytes())
    return transformers.T5Tokenizer(vocab=pieces + extra, _spm_precompiled_charsmap=rules)


def differing(
    ours: CLIPTokenizer | T5Tokenizer, theirs: transformers.PreTrainedTokenizerBase, texts: list[str]
) -> list[str]:
    """The texts, in ASCII, whose padded rows of ids differ."""
    wrong, options = [], dict(padding="max_length", truncation=True, max_length=ours.length)
    for start in range(0, len(texts), 500):
        batch = texts[start : start + 500]
        expected = theirs(batch, **options).input_ids
        wrong += [ascii(text) for text, ids in zip(batch, expected) if ours(text).tolist() != [ids]]
    return wrong


theirs_in = cache(transformers.CLIPTokenizerFast.from_pretrained)  # read once, as it takes time


@cache
def shipped_clip() -> CLIPTokenizer:
    """CLIP's own."""
    return CLIPTokenizer(*packed_clip())


def compared(test: Callable) -> Callable:
    """A test of a list of `texts`, many times."""
    return settings(max_examples=40)(given(texts=TEXTS)(example(texts=FIXED)(test)))


@pytest.mark.parametrize("length", [77, 16])
@compared
def test_small_clip_ids_equal_transformers(clip_folder: Path, length: int, texts: list[str]):
    theirs = theirs_in(clip_folder)
    ours = CLIPTokenizer.from_files(clip_folder / "vocab.json", clip_folder / "merges.txt", length=length)
    assert not differing(ours, theirs, texts)


@compared
def test_shipped_clip_ids_equal_transformers(real_clip_folder: Path, texts: list[str]):
    """CLIP's own vocabulary, as --weights with a single file uses it."""
    theirs = theirs_in(real_clip_folder)
    assert not differing(shipped_clip(), theirs, texts)


@compared
def test_demo_clip_ids_equal_transformers(texts: list[str]):
    theirs = theirs_in(DEMO_FOLDER)
    ours = CLIPTokenizer.from_files(DEMO_FOLDER / "vocab.json", DEMO_FOLDER / "merges.txt")
    assert not differing(ours, theirs, texts)


def test_a_folder_that_declares_its_padding_is_read_as_transformers_reads_it(
    real_clip_folder: Path, tmp_path: Path
):
    """The official tokenizer_2 declares "!": in a prompt it becomes id 0, and not without that file."""
    config = CLIPConfig()
    plain = clip_tokenizer([real_clip_folder], config, pad=0)
    transformers.CLIPTokenizerFast.from_pretrained(real_clip_folder, pad_token="!").save_pretrained(tmp_path)
    declared = clip_tokenizer([tmp_path], config, pad=0)
    theirs = transformers.CLIPTokenizerFast.from_pretrained(tmp_path)
    assert plain("a!")[0, :4].tolist() == [49406, 320, 256, 49407]
    assert declared("a!")[0, :4].tolist() == [49406, 320, 0, 49407]
    assert not differing(declared, theirs, list(strings(500)))


def test_clip_start_end_and_pad(clip_folder: Path):
    files = clip_folder / "vocab.json", clip_folder / "merges.txt"
    start, end = (json.loads(files[0].read_text())[token] for token in ("<|startoftext|>", "<|endoftext|>"))
    assert CLIPTokenizer.from_files(*files, length=5)("").tolist() == [[start, end, end, end, end]]
    assert CLIPTokenizer.from_files(*files, length=5, pad=0)("").tolist() == [[start, end, 0, 0, 0]]
    long = CLIPTokenizer.from_files(*files)("word " * 500)
    assert long.shape == (1, 77) and long.dtype == torch.int64 and long[0, -1] == end and long.argmax() == 76


@pytest.mark.parametrize("length", [77, 16])
@compared
def test_small_t5_ids_equal_transformers(t5_file: Path, length: int, texts: list[str]):
    ours = T5Tokenizer(t5_file, length, extra_ids=T5_EXTRA)
    assert not differing(ours, t5_oracle(t5_file, T5_EXTRA), texts)


@compared
def test_demo_t5_ids_equal_transformers(texts: list[str]):
    file = DEMO_FOLDER / "spiece.model"
    assert not differing(T5Tokenizer(file, 256, extra_ids=T5_EXTRA), t5_oracle(file, T5_EXTRA), texts)


def test_t5_ids_equal_sentencepiece_on_plain_text(t5_file: Path):
    """Its own encoder, without transformers between; plain text alone, see the docstring of T5Tokenizer."""
    for file in (t5_file, DEMO_FOLDER / "spiece.model"):
        ours, theirs = T5Tokenizer(file, 256), sentencepiece.SentencePieceProcessor(model_file=str(file))
        for text in sentences()[:500]:
            text = " ".join(word for word in text.split() if word.isascii() and "<" not in word)
            ids = theirs.encode(text)
            assert ours(text)[0, : len(ids) + 1].tolist() == [*ids, 1], text


@compared
def test_t5_ids_stay_within_the_pieces_without_extra_tokens(texts: list[str]):
    file = DEMO_FOLDER / "spiece.model"
    tokenizer, pieces = (
        T5Tokenizer(file, 256),
        sentencepiece.SentencePieceProcessor(model_file=str(file)).vocab_size(),
    )
    assert max(int(tokenizer(text).max()) for text in texts) < pieces


def test_t5_end_and_pad(t5_file: Path):
    tokenizer = T5Tokenizer(t5_file, length=256)
    assert tokenizer("").tolist() == [[1] + [0] * 255]
    ids = tokenizer("word " * 500)
    assert ids.shape == (1, 256) and ids.dtype == torch.int64 and ids[0, -1] == 1 and (ids[0, :-1] > 1).all()
