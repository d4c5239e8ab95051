"""Tokens that a fine-tune has added: ids and pooled states against transformers', and what is refused."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

import train_free_sample
from tests.models.test_tokenizers import differing, strings, t5_oracle
from tests.small import PIECES, WORDS, random_states, write_folder, write_single
from weights.describe import needs
from weights.load import open_checkpoint

END = WORDS - 1  # id of <|endoftext|>, the last of the demo's vocabulary
NEW = [  # textual inversion and pivotal tuning, with every flag once
    AddedToken("<my-cat>"),
    AddedToken("<s0>", special=True, normalized=False),
    AddedToken("My Dog", single_word=True, normalized=True),
    AddedToken("<left>", lstrip=True),
    AddedToken("<Right>", rstrip=True, normalized=False),
]


def texts(count: int) -> list[str]:
    """Odd strings with the new tokens in them, as they are, in capitals, glued to words and between spaces."""
    rng = random.Random(3)
    spelled = [form for token in NEW for form in (token.content, token.content.upper(), f" {token.content} ")]
    mixed = [f"a photo of{rng.choice(spelled)}{text[:40]}{rng.choice(spelled)}s" for text in strings(count)]
    return ["a photo of <my-cat>", "<s0><s0> My Dogs my dog", "<|ENDOFTEXT|> <|endoftext|> b", *mixed]


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("sd3"), "sd3", random_states("sd3", torch.float32))


@pytest.fixture
def folder(ordinary: Path, tmp_path: Path) -> Path:
    """A copy of an SD3 folder whose tables have rows for the new tokens."""
    shutil.copytree(ordinary, tmp_path / "folder")
    for name, more in (("text_encoder", len(NEW)), ("text_encoder_2", len(NEW)), ("text_encoder_3", 128)):
        add_rows(tmp_path / "folder" / name, more)
    return tmp_path / "folder"


def add_rows(encoder: Path, count: int) -> None:
    """Lengthens the embedding table of a text encoder by random rows, as resize_token_embeddings does."""
    tensors = load_file(encoder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("token_embedding.weight", "shared.weight", "embed_tokens.weight")):
            torch.manual_seed(1)
            tensors[name] = torch.cat([tensor, torch.randn(count, tensor.shape[1])])
            rows = len(tensors[name])
    save_file(tensors, encoder / "model.safetensors", {"format": "pt"})
    config = json.loads((encoder / "config.json").read_text())
    config |= {"vocab_size": rows} | ({"eos_token_id": END} if config["model_type"] != "t5" else {})
    (encoder / "config.json").write_text(json.dumps(config))


def flags(token: AddedToken) -> dict:
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {name: getattr(token, name) for name in names}


def write_config(place: Path, more: dict) -> None:
    (place / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 12} | more))


def as_saved(place: Path) -> None:
    """tokenizer.json and tokenizer_config.json, as transformers 5 saves them."""
    theirs = transformers.CLIPTokenizerFast.from_pretrained(place)
    theirs.add_tokens(NEW)
    shutil.rmtree(place)
    theirs.save_pretrained(place)


def by_decoder(place: Path) -> None:
    """vocab.json, merges.txt and a table by id, as transformers 4 saves them since 4.34."""
    table = {WORDS + i: flags(token) for i, token in enumerate(NEW)}
    table[END] = flags(AddedToken("<|endoftext|>", special=True, normalized=True))
    write_config(place, {"pad_token": "<|endoftext|>", "added_tokens_decoder": table})


def by_added_tokens(place: Path) -> None:
    """vocab.json, merges.txt and added_tokens.json, as older versions save them: ids without flags."""
    ids = {token.content: WORDS + i for i, token in enumerate(NEW)}
    (place / "added_tokens.json").write_text(json.dumps(ids))
    write_config(place, {"additional_special_tokens": ["<s0>"]})


def by_name(place: Path) -> None:
    """Special tokens that are only named follow the vocabulary."""
    write_config(place, {"pad_token": "<pad>", "additional_special_tokens": ["<my-cat>", "<s0>"]})


@pytest.mark.parametrize("files", [as_saved, by_decoder, by_added_tokens, by_name])
def test_clip_ids_equal_transformers(folder: Path, files):
    for name in ("tokenizer", "tokenizer_2"):
        files(folder / name)
    checkpoint = open_checkpoint(str(folder))
    theirs = transformers.CLIPTokenizerFast.from_pretrained(folder / "tokenizer")
    assert theirs.convert_tokens_to_ids("<my-cat>") >= WORDS
    assert not differing(checkpoint.tokenizer("clip_l"), theirs, texts(300)) and needs(checkpoint) == []
    ids = checkpoint.tokenizer("clip_g")("a <my-cat>")[0]
    assert theirs.convert_tokens_to_ids("<my-cat>") in ids


@torch.inference_mode()
def test_pooled_state_is_that_of_the_first_end_token(folder: Path):
    """`close` to transformers, whose rule for an `eos_token_id` that is not 2 this is; the added token has a larger id."""
    for name in ("tokenizer", "tokenizer_2"):
        by_decoder(folder / name)
    checkpoint = open_checkpoint(str(folder))
    for part, name, model in (
        ("clip_l", "text_encoder", transformers.CLIPTextModel),
        ("clip_g", "text_encoder_2", transformers.CLIPTextModelWithProjection),
    ):
        theirs = model.from_pretrained(folder / name, torch_dtype=torch.float32).eval()
        for text in ("a photo of <my-cat> and a dog", "plain", "<s0> " * 40):
            ids = checkpoint.tokenizer(part)(text)
            output = theirs(input_ids=ids, output_hidden_states=True)
            expected = output.pooler_output if part == "clip_l" else output.text_embeds
            penultimate, pooled = checkpoint.load(part, torch.float32)(ids)
            torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(penultimate, output.hidden_states[-2], rtol=1e-4, atol=1e-5)


def t5_with(tokens: list, place: Path) -> transformers.PreTrainedTokenizerBase:
    """transformers' T5 tokenizer of a folder, with T5's own extra tokens and these after them."""
    theirs = t5_oracle(place / "spiece.model", 100)
    theirs.add_tokens(tokens)
    return theirs


@pytest.mark.parametrize("files", ["tokenizer.json", "decoder", "added_tokens.json"])
def test_t5_ids_equal_transformers(folder: Path, files: str):
    place = folder / "tokenizer_3"
    tokens = [token.content for token in NEW] if files == "added_tokens.json" else NEW
    theirs = t5_with(tokens, place)
    ids = {PIECES + 100 + i: token for i, token in enumerate(NEW)}
    if files == "tokenizer.json":
        (place / "spiece.model").unlink()
        theirs.save_pretrained(place)
    elif files == "decoder":
        write_config(place, {"added_tokens_decoder": {id: flags(token) for id, token in ids.items()}})
    else:
        (place / "added_tokens.json").write_text(json.dumps({token.content: id for id, token in ids.items()}))
    checkpoint = open_checkpoint(str(folder))
    assert not differing(checkpoint.tokenizer("t5"), theirs, texts(300)) and needs(checkpoint) == []
    assert PIECES + 100 in checkpoint.tokenizer("t5")("a <my-cat>")[0]


def test_a_t5_token_without_a_row_is_refused_before_any_work(ordinary: Path, tmp_path: Path, run):
    """By --check and at the start; --no-t5 goes on without."""
    shutil.copytree(ordinary, tmp_path, dirs_exist_ok=True)
    theirs = t5_with(["<new-token>"], tmp_path / "tokenizer_3")
    (tmp_path / "tokenizer_3" / "spiece.model").unlink()
    theirs.save_pretrained(tmp_path / "tokenizer_3")
    options = ["--weights", str(tmp_path), "--prompt", "a red star"]
    for more, status in (
        (["--check"], 1),
        (["--explain", "--height=32", "--width=32"], 2),
        (["--check", "--no-t5"], 0),
    ):
        got, said = run(*options, *more)
        assert (got, "<new-token>" in said, f"{PIECES} rows" in said) == (status, status != 0, status != 0), (
            said
        )


def test_extra_tokens_of_t5_without_a_row_are_plain_text(ordinary: Path, tmp_path: Path):
    """tokenizer.json always has <extra_id_0> to <extra_id_99>; a table may end before them."""
    shutil.copytree(ordinary, tmp_path, dirs_exist_ok=True)
    place = tmp_path / "tokenizer_3"
    before = open_checkpoint(str(tmp_path)).tokenizer("t5")
    t5_with([], place).save_pretrained(place)
    (place / "spiece.model").unlink()
    after = open_checkpoint(str(tmp_path))
    assert needs(after) == []
    for text in ("a <extra_id_0> b", "a red star"):
        ids = after.tokenizer("t5")(text)
        assert ids.max() < PIECES and torch.equal(ids, before(text))


def ids_with_a_gap(place: Path) -> None:
    (place / "added_tokens.json").write_text(json.dumps({"<my-cat>": WORDS + 1}))


def taken_id(place: Path) -> None:
    (place / "added_tokens.json").write_text(json.dumps({"<my-cat>": 7}))


def more_than_rows(place: Path) -> None:
    ids = {f"<s{i}>": WORDS + i for i in range(len(NEW) + 1)}
    (place / "added_tokens.json").write_text(json.dumps(ids))


def no_table(place: Path) -> None:
    (place / "added_tokens.json").write_text("[1]")


def odd_flag(place: Path) -> None:
    write_config(place, {"added_tokens_decoder": {WORDS: {"content": "<my-cat>", "lstrip": "yes"}}})


def odd_id(place: Path) -> None:
    write_config(place, {"added_tokens_decoder": {"one": {"content": "<my-cat>"}}})


def no_number(place: Path) -> None:
    (place / "added_tokens.json").write_text(json.dumps({"<my-cat>": str(WORDS)}))


@pytest.mark.parametrize(
    "files, words",
    [
        (ids_with_a_gap, "without gaps"),
        (taken_id, "without gaps"),
        (more_than_rows, f"{WORDS + len(NEW):,} rows"),
        (no_table, "not a JSON object"),
        (odd_flag, "cannot be read"),
        (odd_id, "cannot be read"),
        (no_number, "no whole number"),
    ],
)
def test_added_tokens_that_do_not_fit_are_refused_in_a_sentence(folder: Path, files, words: str):
    files(folder / "tokenizer")
    (said,) = needs(open_checkpoint(str(folder)))
    assert words in said and "tokenizer" in said and len(said) < 600


def test_added_rows_beside_a_single_file_need_its_tokenizer(tmp_path: Path):
    """A single file holds no tokenizer: with rows for added tokens, its vocabulary must lie beside it."""
    states = random_states("sdxl", torch.float32)
    for part in ("clip_l", "clip_g"):
        table = "text_model.embeddings.token_embedding.weight"
        states[part][table] = torch.cat([states[part][table], torch.ones(1, states[part][table].shape[1])])
    file = str(write_single(tmp_path / "sdxl.safetensors", "sdxl", states))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<my-cat>": WORDS}))
    assert (
        WORDS in open_checkpoint(file).tokenizer("clip_g")("<my-cat>") and needs(open_checkpoint(file)) == []
    )
    (tmp_path / "vocab.json").unlink()
    said = needs(open_checkpoint(file))
    assert len(said) == 2 and all("vocab.json" in sentence for sentence in said)


@pytest.fixture
def run(monkeypatch, capsys):
    """The script in this process: (exit status, what it said)."""

    def call(*options: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["train_free_sample.py", *options])
        status = train_free_sample.main()
        told = capsys.readouterr()
        return status, told.out + told.err

    return call
