"""Prompt text to token ids: CLIP's byte-pair encoding (package `tokenizers`) and T5's SentencePiece model.

Both give one row of fixed length, [1, length], which is what the diffusion models were trained on. (Inside this file
`import tokenizers` means the package: Python 3 imports are absolute.)
"""

from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from torch import LongTensor

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
# The words of openai/CLIP `simple_tokenizer.py`: contractions, letters, single digits, runs of anything else.
CLIP_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def fixed_row(ids: list[int], length: int, end: int, pad: int) -> LongTensor:
    """Cut `ids` to leave room for the end token, append it, fill up with `pad`: [1, length]."""
    ids = ids[: length - 1] + [end]
    return torch.tensor([ids + [pad] * (length - len(ids))])


class CLIPTokenizer:
    """CLIP BPE from a Hugging Face `vocab.json` and `merges.txt`; `pad` is 0 for bigG, the end token for CLIP-L."""

    def __init__(self, vocab_file: str | Path, merges_file: str | Path, length: int = 77, pad: int | None = None):
        bpe = BPE.from_file(str(vocab_file), str(merges_file), end_of_word_suffix="</w>", unk_token=CLIP_END)
        self.tokenizer = Tokenizer(bpe)
        self.tokenizer.add_special_tokens([CLIP_START, CLIP_END])  # recognised in the text too
        self.tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        # Words first, then each as the 256 printable stand-ins of its UTF-8 bytes.
        words = pre_tokenizers.Split(Regex(CLIP_SPLIT), behavior="removed", invert=True)
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        self.length = length
        self.start, self.end = (self.tokenizer.token_to_id(token) for token in (CLIP_START, CLIP_END))
        self.pad = self.end if pad is None else pad

    def __call__(self, text: str) -> LongTensor:
        """Token ids [1, length]: start, text (cut if too long), end, padding."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return fixed_row([self.start] + ids, self.length, self.end, self.pad)


class T5Tokenizer:
    """T5's unigram SentencePiece model (`spiece.model`): text, end token 1, padding 0; there is no start token.

    Ids equal those of transformers' T5TokenizerFast but for rare prompts: that one normalises a character together with
    the marks or joiners that follow it and may drop these, splits at U+0085, and reads `</s>` as the end token.
    """

    def __init__(self, model_file: str | Path, length: int = 77):
        self.processor = SentencePieceProcessor(model_file=str(model_file))
        self.length = length

    def __call__(self, text: str) -> LongTensor:
        """Token ids [1, length]: text (cut if too long), end, padding."""
        return fixed_row(self.processor.encode(text), self.length, end=1, pad=0)
