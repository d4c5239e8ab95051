"""Builds the tokenizer of a text encoder from what lies beside its weights, what ships here, or the hub cache.

No single-file checkpoint holds a tokenizer. CLIP's vocabulary ships with the project (clip_vocabulary/README.md names
its source and licence); T5's `spiece.model` does not.
"""

import gzip
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer
from torch import LongTensor

from models.clip import CLIPConfig
from models.t5 import T5Config
from models.tokenizers import (
    CLIP_END,
    CLIP_START,
    CLIPTokenizer,
    T5Tokenizer,
    TextTokenizer,
    fixed_row,
    special_token,
)
from weights.files import WeightsError, read_json

TOKENIZER_FILES = ("vocab.json", "merges.txt", "spiece.model", "tokenizer.json", "tokenizer_config.json",
                   "added_tokens.json", "special_tokens_map.json")  # fmt: skip
PACKED = Path(__file__).parent / "clip_vocabulary" / "merges.txt.gz"
CLIP_WORDS = 49408
T5_WORDS = (32000, 32128)  # pieces of the official spiece.model, rows of the official table
T5_EXTRA = 100  # tokens <extra_id_0> and so on, which transformers adds to the pieces
SENTINEL = re.compile(r"<extra_id_\d+>")
SPECIAL = (  # names of special tokens in tokenizer_config.json and special_tokens_map.json, in transformers' order
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
    "additional_special_tokens", "extra_special_tokens",
)  # fmt: skip
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of a token that files declare
MATCH = "take the tokenizer that belongs to these weights"
T5_SOURCE = "https://huggingface.co/google/t5-v1_1-xxl/resolve/main/spiece.model"


class T5JsonTokenizer(TextTokenizer):
    """T5's tokenizer from a `tokenizer.json`, the only file that transformers 5 saves.

    `rows`: of the encoder's table; tokens <extra_id_i> beyond them are left out, as those of a spiece.model are.
    """

    def __init__(self, file: Path, length: int, rows: int, added: Sequence[AddedToken] = ()):
        whole = json.loads(file.read_text(encoding="utf-8"))
        whole["added_tokens"] = [
            token
            for token in whole.get("added_tokens", [])
            if not beyond(token["content"], token["id"], rows)
        ]
        pieces = whole["model"]["vocab"]
        whole["model"]["vocab"] = [pair for id, pair in enumerate(pieces) if not beyond(pair[0], id, rows)]
        self.tokenizer = Tokenizer.from_str(json.dumps(whole))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.add_tokens([*added])
        self.length, self.room = length, length - 1  # end

    def __call__(self, text: str) -> LongTensor:
        """Token ids [1, length]: text (cut if too long), end, padding."""
        return fixed_row(self.encode(text), self.length, end=1, pad=0)


@dataclass(frozen=True)
class Declared:
    """A token that a tokenizer's folder declares beside the vocabulary; a special one may be named without its id."""

    token: AddedToken
    id: int | None


def declared_tokens(folder: Path) -> list[Declared]:
    """The tokens that a tokenizer's folder declares, those with an id first and in its order, as transformers adds them.

    Ids are in added_tokens.json (transformers 4), tokenizer.json and tokenizer_config.json; of a token that several of them hold, the
    flags of the last count.
    """
    config, whole, ids, named = (
        read_json(folder / name)
        for name in (
            "tokenizer_config.json",
            "tokenizer.json",
            "added_tokens.json",
            "special_tokens_map.json",
        )
    )
    special = []
    for source in (config, named):
        for name in SPECIAL:
            for token in source[name] if isinstance(source.get(name), list) else [source.get(name)]:
                special.append(token.get("content") if isinstance(token, dict) else token)
    found = {
        content: Declared(
            AddedToken(content, special=content in special, normalized=content not in special), id
        )
        for content, id in ids.items()
    }
    tables = [(token["id"], token) for token in whole.get("added_tokens") or ()]
    tables += [(int(id), token) for id, token in (config.get("added_tokens_decoder") or {}).items()]
    for id, token in tables:
        flags = {name: token[name] for name in FLAGS if name in token}
        found[token["content"]] = Declared(AddedToken(token["content"], **flags), id)
    if odd := [each.id for each in found.values() if type(each.id) is not int]:
        raise ValueError(f"the id {odd[0]!r:.50} of an added token is no whole number")
    others = [
        Declared(special_token(token), None)
        for token in dict.fromkeys(special)
        if token and token not in found
    ]
    return sorted(found.values(), key=lambda declared: declared.id) + others


def declared_pad(folder: Path) -> str | None:
    """The padding token that a tokenizer's folder declares: transformers then also reads it in a prompt as this token.

    The official `tokenizer_2` declares "!", which in a prompt becomes id 0; openai/CLIP and Stability's code do not so.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        pad = read_json(folder / name).get("pad_token")
        pad = pad.get("content") if isinstance(pad, dict) else pad
        if isinstance(pad, str) and pad:
            return pad
    return None


def beyond(token: str, id: int | None, rows: int) -> bool:
    """Whether this is a token <extra_id_i> of T5 without a row of its own: nobody has trained it."""
    return SENTINEL.fullmatch(token) is not None and (id is None or id >= rows)


def check_ids(tokenizer: Tokenizer, declared: Iterable[Declared], rows: int, place: Path, hint: str) -> None:
    """WeightsError where a token has none of the rows of the encoder's table, or another id than is declared."""
    ids = tokenizer.get_vocab() | {each.token.content: each.id for each in declared if each.id is not None}
    token, last = max(ids.items(), key=lambda item: item[1])
    if last >= rows:
        raise WeightsError(
            f"The vocabulary in {place} has {last + 1:,} tokens, the last {ascii(token):.80}, but its text encoder has only"
            f" {rows:,} rows: {hint}."
        )
    for each in declared:
        got = tokenizer.token_to_id(each.token.content)
        if each.id is not None and got != each.id:
            raise WeightsError(
                f"{place} declares the token {ascii(each.token.content):.80} with id {each.id}, but it is {got} where added tokens"
                f" follow the vocabulary without gaps: {hint}."
            )


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


def clip_tokenizer(folders: Iterable[Path], config: CLIPConfig, pad: int | None) -> CLIPTokenizer:
    """From vocab.json and merges.txt, or tokenizer.json, in the first folder that has them; else what ships here.

    `pad` (None: the end token) is for those whose folder declares no padding token.
    """
    tokenizer, place, declared = None, None, []
    for place in folders:
        vocab, merges, whole = (place / name for name in ("vocab.json", "merges.txt", "tokenizer.json"))
        try:
            if not (vocab.is_file() and merges.is_file() or whole.is_file()):
                continue
            declared = declared_tokens(place)
            options = config.positions, pad, [each.token for each in declared]
            if vocab.is_file() and merges.is_file():
                tokenizer = CLIPTokenizer.from_files(vocab, merges, *options)
            else:
                tokenizer = clip_of_json(whole, *options)
            if own_pad := declared_pad(place):
                tokenizer.pad = tokenizer.tokenizer.token_to_id(own_pad)
        except WeightsError:
            raise
        except Exception as error:  # the tokenizers package raises bare Exception
            raise WeightsError(f"The CLIP vocabulary in {place} cannot be read: {error!r:.200}.") from None
        break
    if tokenizer is None and config.vocabulary == CLIP_WORDS:
        tokenizer, place = CLIPTokenizer(*packed_clip(), config.positions, pad), PACKED
    if tokenizer is None:
        raise WeightsError(
            f"A text encoder knows {config.vocabulary:,} tokens, which is not CLIP's vocabulary: put its"
            " vocab.json and merges.txt beside it."
        )
    check_ids(tokenizer.tokenizer, declared, config.vocabulary, place, MATCH)
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
    rows, declared = config.vocabulary, []
    try:
        if file.parent.name == "tokenizer_3" or option is not None and Path(option).is_dir():
            declared = [
                each for each in declared_tokens(file.parent) if not beyond(each.token.content, each.id, rows)
            ]
        added = [each.token for each in declared]
        if file.suffix == ".json":
            tokenizer = T5JsonTokenizer(file, length, rows, added)
            words = tokenizer.tokenizer.get_vocab_size(with_added_tokens=False)
        else:
            words = spiece_words(file)
            tokenizer = T5Tokenizer(file, length, max(0, min(T5_EXTRA, rows - words)), added)
    except WeightsError:
        raise
    except Exception as error:  # both packages raise what they like, bare Exception included
        raise WeightsError(
            f"T5's vocabulary {file} cannot be read ({error!s:.120}): fetch {T5_SOURCE} again."
        ) from None
    if words > rows:
        raise WeightsError(f"T5's vocabulary {file} has {words:,} pieces, but the encoder knows {rows:,}.")
    check_ids(tokenizer.tokenizer, declared, rows, file, f"{MATCH} (--no-t5 works without it)")
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
