"""Builds the tokenizer of a text encoder from what lies beside its weights, what ships here, or the hub cache.

No single-file checkpoint holds a tokenizer. CLIP's vocabulary ships with the project (clip_vocabulary/README.md names
its source and licence); T5's `spiece.model` does not.
"""

import gzip
import json
import os
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from sentencepiece import SentencePieceProcessor
from torch import LongTensor

from models.clip import CLIPConfig
from models.t5 import T5Config
from models.tokenizers import CLIP_END, CLIP_START, CLIPTokenizer, T5Tokenizer, fixed_row
from weights.files import WeightsError

PACKED = Path(__file__).parent / "clip_vocabulary" / "merges.txt.gz"
CLIP_WORDS = 49408
T5_WORDS = (32000, 32128)  # pieces of the official spiece.model, rows of the official table
T5_EXTRA = 100  # tokens <extra_id_0> and so on, which transformers adds to the pieces
T5_SOURCE = "https://huggingface.co/google/t5-v1_1-xxl/resolve/main/spiece.model"


class T5JsonTokenizer:
    """T5's tokenizer from a `tokenizer.json`, the only file that transformers 5 saves."""

    def __init__(self, file: Path, length: int):
        self.tokenizer = tokenizers.Tokenizer.from_file(str(file))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.length = length

    def __call__(self, text: str) -> LongTensor:
        """Token ids [1, length]: text (cut if too long), end, padding."""
        return fixed_row(self.tokenizer.encode(text, add_special_tokens=False).ids, self.length, end=1, pad=0)


def packed_clip() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary and merges: 256 bytes, the same at the end of a word, one token a merge, start and end.

    The order is that of openai/CLIP `simple_tokenizer.py`: the bytes with a printable stand-in of their own come first.
    """
    merges = [tuple(line.split(" ")) for line in gzip.decompress(PACKED.read_bytes()).decode().splitlines()]
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = letters + [letter + "</w>" for letter in letters] + ["".join(merge) for merge in merges]
    return {word: i for i, word in enumerate(words + [CLIP_START, CLIP_END])}, merges


def clip_of_json(file: Path, *options) -> CLIPTokenizer:
    """A CLIP tokenizer from the vocabulary in a `tokenizer.json`."""
    model = json.loads(file.read_text(encoding="utf-8"))["model"]
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    return CLIPTokenizer(model["vocab"], merges, *options)


def declared_pad(folder: Path) -> list[str]:
    """The padding token that a tokenizer's folder declares: transformers then also reads it in a prompt as this token.

    The official `tokenizer_2` declares "!", which in a prompt becomes id 0; openai/CLIP and Stability's code do not so.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            pad = json.loads((folder / name).read_text(encoding="utf-8")).get("pad_token")
            pad = pad.get("content") if isinstance(pad, dict) else pad
            if isinstance(pad, str) and pad:
                return [pad]
    return []


def clip_tokenizer(folders: Iterable[Path], config: CLIPConfig, pad: int | None) -> CLIPTokenizer:
    """From vocab.json and merges.txt, or tokenizer.json, in the first folder that has them; else what ships here.

    `pad` (None: the end token) is for those whose folder declares no padding token.
    """
    tokenizer, place = None, None
    for place in folders:
        vocab, merges, whole = (place / name for name in ("vocab.json", "merges.txt", "tokenizer.json"))
        try:
            if vocab.is_file() and merges.is_file():
                tokenizer = CLIPTokenizer.from_files(
                    vocab, merges, config.positions, pad, declared_pad(place)
                )
            elif whole.is_file():
                tokenizer = clip_of_json(whole, config.positions, pad, declared_pad(place))
            if tokenizer is not None and (declared := declared_pad(place)):
                tokenizer.pad = tokenizer.tokenizer.token_to_id(declared[0])
        except Exception as error:  # the tokenizers package raises bare Exception
            raise WeightsError(f"The CLIP vocabulary in {place} cannot be read: {error!r:.200}.") from None
        if tokenizer is not None:
            break
    if tokenizer is None and config.vocabulary == CLIP_WORDS:
        tokenizer, place = CLIPTokenizer(*packed_clip(), config.positions, pad), PACKED
    if tokenizer is None:
        raise WeightsError(
            f"A text encoder knows {config.vocabulary:,} tokens, which is not CLIP's vocabulary: put its"
            " vocab.json and merges.txt beside it."
        )
    words = tokenizer.tokenizer.get_vocab_size()
    if words > config.vocabulary or tokenizer.end != words - 1:
        raise WeightsError(
            f"The vocabulary in {place} has {words:,} tokens, end token {tokenizer.end}; its text"
            f" encoder knows {config.vocabulary:,}, and the end token must be the last."
        )
    return tokenizer


def t5_tokenizer(
    folders: Iterable[Path], config: T5Config, length: int, option: str | None = None
) -> T5Tokenizer | T5JsonTokenizer:
    """From the file (or its folder) given by option, else spiece.model in one of the folders, else the hub cache."""
    if option is not None:
        file = Path(option)
        places = [file / "spiece.model", file / "tokenizer.json"] if file.is_dir() else [file]
    else:
        folders = list(folders)
        places = [folder / "spiece.model" for folder in folders]
        places += [folder / "tokenizer.json" for folder in folders if folder.name == "tokenizer_3"]
        if config.vocabulary == T5_WORDS[1]:
            places += cached_t5()
    file = next((file for file in places if file.is_file()), None)
    if file is None:
        where = f"at {option}" if option is not None else f"beside the checkpoint ({places[0].parent})"
        raise WeightsError(
            f"T5's vocabulary was not found {where}: fetch {T5_SOURCE} and put it there (--no-t5 works"
            " without it)."
        )
    try:
        if file.suffix == ".json":
            tokenizer = T5JsonTokenizer(file, length)
            words = tokenizer.tokenizer.get_vocab_size(with_added_tokens=False)
        else:
            words = spiece_words(file)
            tokenizer = T5Tokenizer(file, length, extra_ids=max(0, min(T5_EXTRA, config.vocabulary - words)))
    except Exception as error:  # both packages raise what they like, bare Exception included
        raise WeightsError(
            f"T5's vocabulary {file} cannot be read ({error!s:.120}): fetch {T5_SOURCE} again."
        ) from None
    if words > config.vocabulary:
        raise WeightsError(
            f"T5's vocabulary {file} has {words:,} pieces, but the encoder knows {config.vocabulary:,}."
        )
    return tokenizer


def hub_cache() -> Path:
    """The folder in which huggingface_hub keeps what it fetched."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))


def cached_t5() -> list[Path]:
    """Every T5 v1.1 spiece.model in the hub cache: of T5 itself and of SD3 and Flux folders."""
    found = (
        sorted(hub_cache().glob(f"models--*/snapshots/*/{place}spiece.model"))
        for place in ("", "tokenizer_3/", "tokenizer_2/")
    )
    return [file for files in found for file in files if file.is_file() and spiece_words(file) == T5_WORDS[0]]


def spiece_words(file: Path) -> int:
    """Number of pieces in a SentencePiece model; 0 if it is none."""
    try:
        return SentencePieceProcessor(model_file=str(file)).vocab_size() if file.stat().st_size else 0
    except (OSError, RuntimeError, TypeError):
        return 0
