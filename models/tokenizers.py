"""Prompt text to token ids: CLIP's byte-pair encoding and T5's unigram model, both by the package `tokenizers`.

Both give one row of fixed length, [1, length], which is what the diffusion models were trained on. (Inside this file
`import tokenizers` means the package: Python 3 imports are absolute.)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram
from torch import LongTensor

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
# The words of openai/CLIP `simple_tokenizer.py`: contractions, letters, single digits, runs of anything else.
CLIP_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def fixed_row(ids: list[int], length: int, end: int, pad: int) -> LongTensor:
    """Cut `ids` to leave room for the end token, append it, fill up with `pad`: [1, length]."""
    ids = ids[: length - 1] + [end]
    return torch.tensor([ids + [pad] * (length - len(ids))])


def special_token(content: str) -> AddedToken:
    """A token that is recognised anywhere in the text, spelled exactly so."""
    return AddedToken(content, special=True, normalized=False)


@dataclass(frozen=True)
class Cut:
    """What becomes of a text that has more tokens than fit: how many it has, how many are read, and the rest of the text."""

    tokens: int
    read: int
    left_out: str


class TextTokenizer:
    """What all tokenizers here have: `tokenizer`, of the package; `length` of a row; `room`, the tokens of text in it."""

    tokenizer: Tokenizer
    length: int
    room: int

    def encode(self, text: str) -> list[int]:
        """The ids of the text alone, all of them."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def cut(self, text: str) -> Cut | None:
        """What a row leaves out of the text; None where it holds all of it."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        if len(encoding.ids) <= self.room:
            return None
        return Cut(len(encoding.ids), self.room, text[encoding.offsets[self.room][0] :].strip())


class CLIPTokenizer(TextTokenizer):
    """CLIP BPE from a vocabulary (token -> id) and its merges in order; `pad` is 0 for bigG, the end token for CLIP-L.

    `added`: tokens that are recognised in the text as a whole. Those that the vocabulary lacks follow it, in this order.
    """

    def __init__(
        self,
        vocabulary: dict[str, int],
        merges: Sequence[tuple[str, str]],
        length: int = 77,
        pad: int | None = None,
        added: Sequence[AddedToken] = (),
    ):
        self.tokenizer = Tokenizer(
            BPE(vocabulary, list(merges), end_of_word_suffix="</w>", unk_token=CLIP_END)
        )
        given = {token.content for token in added}
        own = [special_token(content) for content in (CLIP_START, CLIP_END) if content not in given]
        self.tokenizer.add_tokens([*added, *own])
        self.tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        # Words first, then each as the 256 printable stand-ins of its UTF-8 bytes.
        words = pre_tokenizers.Split(Regex(CLIP_SPLIT), behavior="removed", invert=True)
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        self.length, self.room = length, length - 2  # start and end
        self.start, self.end = (self.tokenizer.token_to_id(token) for token in (CLIP_START, CLIP_END))
        self.pad = self.end if pad is None else pad

    @classmethod
    def from_files(cls, vocab_file: str | Path, merges_file: str | Path, *rest, **options) -> "CLIPTokenizer":
        """From a Hugging Face `vocab.json` and `merges.txt`."""
        return cls(*BPE.read_file(str(vocab_file), str(merges_file)), *rest, **options)

    def __call__(self, text: str) -> LongTensor:
        """Token ids [1, length]: start, text (cut if too long), end, padding."""
        return fixed_row([self.start] + self.encode(text), self.length, self.end, self.pad)


class T5Tokenizer(TextTokenizer):
    """T5's unigram model from `spiece.model`: text, end token 1, padding 0; there is no start token.

    Built by the rules of the official `tokenizer.json`, whose ids differ from sentencepiece's own in rare prompts
    (marks after a character, U+0085, a literal `</s>`). `extra_ids`: number of tokens <extra_id_i> that follow the
    pieces, the last first. `added`: as for CLIP.
    """

    def __init__(
        self,
        model_file: str | Path,
        length: int = 77,
        extra_ids: int = 0,
        added: Sequence[AddedToken] = (),
    ):
        model = Path(model_file).read_bytes()
        if not model:  # which the package takes for a model without pieces
            raise ValueError("it is empty")
        processor = SentencePieceProcessor(model_proto=model)  # refuses what is no such model
        if (processor.pad_id(), processor.eos_id(), processor.unk_id()) != (0, 1, 2):
            raise ValueError("its first pieces are not T5's padding, end and unknown")
        pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.vocab_size())]
        extra = [f"<extra_id_{i}>" for i in reversed(range(extra_ids))]
        self.length, self.room = length, length - 1  # end
        self.tokenizer = Tokenizer(
            Unigram(pieces + [(token, 0.0) for token in extra], unk_id=2, byte_fallback=False)
        )
        given = {token.content for token in added}
        own = [piece for piece, _ in pieces[:3]] + extra  # <pad>, </s>, <unk>
        self.tokenizer.add_tokens([special_token(piece) for piece in own if piece not in given] + [*added])
        if rules := character_map(model):
            self.tokenizer.normalizer = normalizers.Precompiled(rules)
        spaces = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always", split=True)
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])

    def __call__(self, text: str) -> LongTensor:
        """Token ids [1, length]: text (cut if too long), end, padding."""
        return fixed_row(self.encode(text), self.length, end=1, pad=0)


def character_map(model: bytes) -> bytes:
    """The compiled normalisation rules of a SentencePiece model: ModelProto.normalizer_spec.precompiled_charsmap.

    Field numbers: sentencepiece_model.proto of google/sentencepiece.
    """
    return dict(fields(dict(fields(model)).get(3, b""))).get(2, b"")


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a well-formed protobuf message; spares a dependency on protobuf."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = message[at], at + 1
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        size = {0: 0, 1: 8, 5: 4}.get(key & 7)  # wire types: varint, 64 bit, 32 bit; else length-delimited
        if size == 0:
            yield key >> 3, varint()
            continue
        size = varint() if size is None else size
        at += size
        yield key >> 3, message[at - size : at]
