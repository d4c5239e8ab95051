"""Makes the tokenizer files of the demo checkpoints: vocab.json and merges.txt (CLIP), spiece.model (T5).

Both are trained on captions of the training split and a list of common words; every word of a caption becomes one
token. The vocabulary has CLIP's order: 256 byte symbols, the same with "</w>" (end of word), the merges, the start
token, and the end token last. Same input, same files; spiece.model depends on sentencepiece's
version too (the committed one: 0.2.3).

    python -m weights.demo.tokenizers --out weights/demo
"""

import argparse
import io
import json
import re
from collections import Counter
from pathlib import Path

import sentencepiece

from hybridiff.app.files import write_whole
from weights.demo.scenes import sample

FILES = ("vocab.json", "merges.txt", "spiece.model")
WORDS = """
about after again air all also always an and animal any are art as at back ball be bear beautiful bed between bird
boat body book both bottom box bright brown by can car cat center chair child city clear close cloud cold color colour
corner cup dark day desert diamond dog door down drawing each earth edge eye face family field fire fish five flat
floor flower food for forest four fox from front full game garden girl glass gold good grass gray great grey ground
hair hand hat he head heart high hill home horse hot house how ice image in inside into is island it its lake land
last leaf light line lion little long look made man many middle moon more mountain near new next night no not number
ocean of off old on one only open or other out over painting paper park part people photo picture piece place plain
plane plant portrait rain rainbow red right river road robot rock room round sand scene sea sea shadow shape she ship
shiny show side sign silver simple sky small snow so soft some spring square star stone street style sun sunset table
tall ten that the their them there thin thing this three tiny to top town train tree two under up very wall warm water
we wet what wheel where which who wide wild wind window winter with without woman wood word world year you young
""".split()


def corpus() -> list[str]:
    """20,000 training captions and each common word forty times."""
    return [sample("train", index)[1] for index in range(20000)] + 40 * WORDS


def byte_symbols() -> list[str]:
    """The printable stand-ins of the 256 bytes in CLIP's order (openai/CLIP `simple_tokenizer.py`, bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]


def byte_pair_merges(words: Counter[str], least: int) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al. 2016, algorithm 1): merges the commonest pair while it occurs `least` times."""
    spelling = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    merges = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in zip(spelling[word], spelling[word][1:]):
                pairs[pair] += count
        if not pairs or max(pairs.values()) < least:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))  # ties in alphabetical order
        merges.append(best)
        spelling = {word: _merge(symbols, best) for word, symbols in spelling.items()}


def _merge(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """The symbols with each occurrence of the pair joined, left to right."""
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)


def write_clip(lines: list[str], folder: Path) -> None:
    """Writes vocab.json and merges.txt."""
    words = Counter(word for line in lines for word in re.findall(r"[a-z]+|,", line))
    merges = byte_pair_merges(words, least=40)
    tokens = (
        byte_symbols() + [symbol + "</w>" for symbol in byte_symbols()] + ["".join(pair) for pair in merges]
    )
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = json.dumps({token: index for index, token in enumerate(tokens)})
    write_whole(folder / "vocab.json", lambda temporary: temporary.write_text(vocabulary))
    text = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)])
    write_whole(folder / "merges.txt", lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))


def write_t5(lines: list[str], folder: Path) -> None:
    """Writes spiece.model: unigram, padding 0, end 1, unknown 2, no start token, as T5's; folds case.

    The trainer starts from substrings that two different words share: the plurals make each word one of them.
    """
    words = {word for line in lines for word in re.findall(r"[a-z]+", line)}
    lines = lines + [f"{word} {word}s" for word in sorted(words)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=800,
        hard_vocab_limit=False,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        shuffle_input_sentence=False,
        minloglevel=2,
        normalization_rule_name="nmt_nfkc_cf",
        required_chars="abcdefghijklmnopqrstuvwxyz0123456789.,!?'-",
    )
    write_whole(folder / "spiece.model", lambda temporary: temporary.write_bytes(model.getvalue()))


def t5_size(model_file: Path) -> int:
    """Number of pieces in a spiece.model."""
    return sentencepiece.SentencePieceProcessor(model_file=str(model_file)).vocab_size()


def write_all(folder: Path) -> None:
    """Writes the three files into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = corpus()
    write_clip(lines, folder)
    write_t5(lines, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the three files")
    write_all(parser.parse_args().out)
