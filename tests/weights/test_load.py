"""Loading: both layouts of one checkpoint, optional tensors, variants, dtypes, tokenizers, bad files.

Comparisons of tensors are `equal` throughout; bad files end in a WeightsError of one sentence.
"""

import io
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hybridiff.text import encode
from tests.method.test_samplers import relative
from tests.models.test_tokenizers import t5_oracle
from tests.official import tensors, write_sparse
from tests.small import FOLDERS, PIECES, PREFIXES, SIZES, random_states, write_folder, write_single
from weights import find
from weights.describe import describe, needs
from weights.load import Checkpoint, WeightsError, open_checkpoint

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["sdxl", "sd3"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def states(family: str) -> dict[str, dict[str, Tensor]]:
    return random_states(family, torch.float16)


@pytest.fixture(scope="module")
def single(family: str, states: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single(tmp_path_factory.mktemp("single") / "model.safetensors", family, states)


@pytest.fixture(scope="module")
def folder(family: str, states: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder"), family, states)


def assert_equal(checkpoint: Checkpoint, states: dict[str, dict[str, Tensor]]) -> None:
    """Every part loads to exactly these tensors."""
    for part, state in states.items():
        loaded = checkpoint.load(part, checkpoint.dtype(part)).state_dict()
        assert loaded.keys() == state.keys()
        assert all(
            torch.equal(loaded[name], tensor) and loaded[name].is_contiguous()
            for name, tensor in state.items()
        )


def test_both_layouts_give_bit_equal_modules(family: str, states: dict, single: Path, folder: Path):
    for path, layout in ((single, "single"), (folder, "folder")):
        checkpoint = open_checkpoint(str(path))
        assert (checkpoint.family, checkpoint.layout, set(checkpoint.parts)) == (family, layout, set(states))
        assert {part: checkpoint.config(part) for part in checkpoint.parts} == SIZES[family]
        assert_equal(checkpoint, states)
        assert needs(checkpoint) == []


def test_loading_converts_and_freezes(single: Path):
    module = open_checkpoint(str(single)).load("vae", torch.float32, decoder_only=True)
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert not any(name.startswith(("encoder.", "quant_conv.")) for name in module.state_dict())
    module.decode(torch.zeros(1, module.config.latent_channels, 2, 2))


def test_weights_in_the_dtype_of_the_file_are_the_mapped_file(single: Path):
    """Loaded twice, a tensor lies in the same file pages: no copy of it is made."""
    module = open_checkpoint(str(single)).load("denoiser", torch.float16)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(single) in line]
    ranges = [tuple(int(x, 16) for x in line[0].split("-")) for line in maps]
    assert all(any(a <= p.data_ptr() < b for a, b in ranges) for p in module.parameters())


def test_a_file_is_mapped_anew_on_the_way(single: Path, states: dict, monkeypatch: pytest.MonkeyPatch):
    """At once here, at full size every half gigabyte: `equal` tensors, and after a conversion no page of the file is held."""
    monkeypatch.setattr("weights.files.REMAP", 0)
    checkpoint = open_checkpoint(str(single))
    assert_equal(checkpoint, states)
    kept = [checkpoint.load(part, torch.float32) for part in checkpoint.parts]
    assert kept and str(single) not in Path("/proc/self/maps").read_text()


def test_shards_and_fp16_variants_of_a_folder(family: str, states: dict, folder: Path, tmp_path: Path):
    write_folder(tmp_path / "shards", family, states, shard_size="300KB")
    assert list((tmp_path / "shards").rglob("*-of-*.safetensors"))
    assert_equal(open_checkpoint(str(tmp_path / "shards")), states)
    shutil.copytree(folder, tmp_path / "fp16")
    for file in list((tmp_path / "fp16").rglob("*.safetensors")):
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert_equal(open_checkpoint(str(tmp_path / "fp16")), states)
    for file in list((tmp_path / "fp16").rglob("*.fp16.safetensors")):  # the plain files were not fetched
        file.with_name(file.name.replace(".fp16", "")).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        )
    assert_equal(open_checkpoint(str(tmp_path / "fp16")), states)
    assert sum(
        "the variant fp16 beside it is taken" in remark
        for remark in open_checkpoint(str(tmp_path / "fp16")).remarks
    ) == len(states)
    shutil.copytree(
        tmp_path / "shards", tmp_path / "old"
    )  # numbers before the variant, as diffusers once named them
    for file in list((tmp_path / "old").rglob("*.safetensors")):
        file.rename(file.with_suffix(".fp16.safetensors"))
    for stray in ("another_model", "pytorch_lora_weights"):  # beside the model's own file
        save_file(
            {"x": torch.zeros(1)},
            next((tmp_path / "old").glob("vae/*.safetensors")).with_name(f"{stray}.safetensors"),
        )
    assert_equal(open_checkpoint(str(tmp_path / "old")), states)
    next((tmp_path / "shards" / FOLDERS[family]["denoiser"]).glob("*-00002-of-*.safetensors")).unlink()
    with pytest.raises(WeightsError, match="shards: fetch the others"):
        open_checkpoint(str(tmp_path / "shards"))


def test_optional_tensors_are_accepted_present(family: str, states: dict, tmp_path: Path):
    extra = {
        PREFIXES[family]["clip_l"] + "text_model.embeddings.position_ids": torch.arange(12)[None],
        "model_ema.decay": torch.tensor(0.5), "alphas_cumprod": torch.zeros(1000), "betas": torch.zeros(1000),
    }  # fmt: skip
    extra |= {
        "denoiser.sigmas": torch.zeros(1000), "conditioner.embedders.0.logit_scale": torch.tensor(4.6),
        PREFIXES[family]["clip_g"] + "transformer.text_model.embeddings.position_ids": torch.arange(12)[None],
    } if family == "sdxl" else {
        "model.model_sampling.sigmas": torch.zeros(1000), "text_encoders.t5xxl.logit_scale": torch.tensor(1.0),
    }  # fmt: skip
    assert_equal(
        open_checkpoint(str(write_single(tmp_path / "x.safetensors", family, states, extra=extra))), states
    )


def test_clip_l_of_sdxl_without_its_unused_end(tmp_path: Path):
    sizes = SIZES["sdxl"] | {"clip_l": replace(SIZES["sdxl"]["clip_l"], width=768, heads=12, layers=12)}
    sizes["denoiser"] = replace(sizes["denoiser"], context_width=768 + 128)
    states = random_states("sdxl", torch.float16, sizes)
    short = {
        k: v for k, v in states["clip_l"].items() if ".layers.11." not in k and "final_layer_norm" not in k
    }
    write_single(tmp_path / "whole.safetensors", "sdxl", states)
    write_single(tmp_path / "short.safetensors", "sdxl", states | {"clip_l": short})
    ids = torch.tensor([[1, 5, 9, 2, 0]])
    whole, less = (open_checkpoint(str(tmp_path / f"{name}.safetensors")).load("clip_l", torch.float32)
                   for name in ("whole", "short"))  # fmt: skip
    assert torch.equal(less(ids)[0], whole(ids)[0])


def test_bigg_with_its_projection_stored_as_a_linear_layer(tmp_path: Path):
    states = random_states("sdxl", torch.float16)
    stored = load_file(write_single(tmp_path / "x.safetensors", "sdxl", states))
    name = PREFIXES["sdxl"]["clip_g"] + "text_projection"
    stored[f"{name}.weight"] = stored.pop(name).T.contiguous()
    save_file(stored, tmp_path / "y.safetensors")
    assert_equal(open_checkpoint(str(tmp_path / "y.safetensors")), states)


def test_a_projection_of_clip_l_counts_in_sd3_folders_alone(tmp_path: Path):
    """Inside a file, named by option or found beside: the module is that without one, as in Stability's code."""
    sizes = SIZES["sd3"] | {
        "clip_l": replace(SIZES["sd3"]["clip_l"], width=768, heads=12, layers=12)
    }  # the width tells what a lone file is
    sizes["denoiser"] = replace(sizes["denoiser"], pooled_width=768 + 128)
    states = random_states("sd3", torch.float16, sizes)
    projected = states["clip_l"] | {"text_projection.weight": torch.ones(768, 768, dtype=torch.float16)}
    (tmp_path / "alone").mkdir()
    inside = write_single(tmp_path / "m.safetensors", "sd3", states | {"clip_l": projected})
    alone = write_single(
        tmp_path / "alone" / "m.safetensors",
        "sd3",
        {part: state for part, state in states.items() if part != "clip_l"},
    )
    save_file(projected, tmp_path / "clip.safetensors")
    assert_equal(open_checkpoint(str(inside)), states)
    assert_equal(open_checkpoint(str(alone), text_encoders=[str(tmp_path / "clip.safetensors")]), states)
    (tmp_path / "clip.safetensors").rename(tmp_path / "alone" / "clip.safetensors")
    assert_equal(open_checkpoint(str(alone)), states)

    small = random_states("sd3", torch.float16)
    folder, projection = tmp_path / "folder", torch.rand(64, 64).half()
    write_folder(folder, "sd3", {part: small[part] for part in ("denoiser", "clip_l")})
    file = folder / "text_encoder" / "model.safetensors"
    save_file(load_file(file) | {"text_projection.weight": projection}, file)
    assert_equal(
        open_checkpoint(str(folder)), {"clip_l": small["clip_l"] | {"text_projection.weight": projection}}
    )


def test_t5_under_either_name_of_its_table_and_in_fp8(tmp_path: Path):
    states = random_states("sd3", torch.float16)
    path = write_single(tmp_path / "x.safetensors", "sd3", states)
    table = PREFIXES["sd3"]["t5"] + "shared.weight"
    stored = load_file(path)
    del stored[table]
    save_file(stored, path)
    assert_equal(open_checkpoint(str(path)), states)
    for key in stored:
        if key.startswith(PREFIXES["sd3"]["t5"]):
            stored[key] = stored[key].to(torch.float8_e4m3fn)
    save_file(stored, path)
    checkpoint = open_checkpoint(str(path))
    assert (checkpoint.dtype("t5"), checkpoint.dtype("clip_l")) == (torch.float8_e4m3fn, torch.float16)
    loaded = checkpoint.load("t5", torch.float16).state_dict()
    for name, tensor in states["t5"].items():
        assert torch.equal(loaded[name], tensor.to(torch.float8_e4m3fn).to(torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_t5_runs_in_its_stored_fp8(tmp_path: Path, dtype: torch.dtype):
    """`equal` to the fp8 weights brought to the computing dtype at once, in little more than half of fp16's bytes."""
    states = random_states("sd3", torch.float16)
    states["t5"] = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in states["t5"].items()}
    checkpoint = open_checkpoint(str(write_single(tmp_path / "x.safetensors", "sd3", states)))
    whole, stored = (checkpoint.load("t5", dtype, stored=stored) for stored in (False, True))
    kept = sum(
        tensor.nbytes for tensor in stored.state_dict().values() if tensor.dtype == torch.float8_e4m3fn
    )
    assert kept == sum(layer.weight.numel() for layer in whole.modules() if isinstance(layer, nn.Linear)) > 0
    ids = checkpoint.tokenizer("t5")("a red star")
    with torch.inference_mode():
        assert torch.equal(whole(ids), stored(ids))
        told = [
            encode(checkpoint, "a red star", None, 32, 32, torch.device("cpu"), dtype, t5)
            for t5 in ("device", "cpu", "fp8")
        ]
    device, cpu, fp8 = (branches["cond"].text for branches in told)
    assert torch.equal(device, fp8) and cpu.dtype == dtype
    assert (
        torch.equal(device, cpu) if dtype == torch.float32 else relative(cpu, device) < 0.02
    )  # there T5 computes in fp32


def test_t5_on_the_cpu_is_the_mapped_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever the precision of the rest: its linear layers are not copied, and the text is `equal` to that of copied ones."""
    checkpoint = open_checkpoint(
        str(write_single(tmp_path / "x.safetensors", "sd3", random_states("sd3", torch.float16)))
    )
    told, loaded, load = [], [], checkpoint.load
    for forced in (False, True):

        def spy(part: str, *options, stored: bool = False, forced: bool = forced):
            loaded.append((part, stored))
            return load(part, *options, stored=stored and not forced)

        monkeypatch.setattr(checkpoint, "load", spy)
        with torch.inference_mode():
            told.append(
                encode(checkpoint, "a red star", None, 32, 32, torch.device("cpu"), torch.float32)[
                    "cond"
                ].text
            )
    assert torch.equal(*told) and loaded.count(("t5", True)) == 2


def test_a_text_encoder_that_lacks_its_last_layer_is_refused(folder: Path, tmp_path: Path):
    """What is left would make up a network, but config.json knows how many layers there are."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "text_encoder_2" / "model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if ".layers.1." not in key}, file)
    with pytest.raises(WeightsError, match="1 layers are there where 2 are expected"):
        open_checkpoint(str(tmp_path))


def test_text_encoders_beside_an_sd3_file_or_by_option(tmp_path: Path):
    states = random_states("sd3", torch.float16)
    encoders = {part: states[part] for part in ("clip_l", "clip_g", "t5")}
    (tmp_path / "alone").mkdir()
    alone = write_single(
        tmp_path / "alone" / "m.safetensors", "sd3", {p: states[p] for p in ("denoiser", "vae")}
    )
    checkpoint = open_checkpoint(str(alone))
    assert checkpoint.parts == ("denoiser", "vae") and [s.split()[0] for s in needs(checkpoint)] == [
        "clip_l",
        "clip_g",
    ]
    assert "can be left out" in describe(checkpoint) and "Needed: clip_l is missing" in describe(checkpoint)
    files = []
    for i, state in enumerate(encoders.values()):
        files.append(tmp_path / f"{i}.safetensors")  # the names tell nothing
        save_file(state, files[-1])
    assert_equal(open_checkpoint(str(alone), text_encoders=[str(file) for file in files]), states)
    with pytest.raises(WeightsError, match="both a clip_g text encoder"):
        open_checkpoint(str(alone), text_encoders=[str(files[1]), str(files[0]), str(files[1])])
    for file in files:
        shutil.copy(file, alone.parent)
    assert_equal(open_checkpoint(str(alone)), states)
    with pytest.raises(WeightsError, match="not a text encoder"):
        open_checkpoint(str(alone), text_encoders=[str(alone)])


def test_a_text_encoder_beside_that_does_not_fit_gives_way_to_one_that_does(tmp_path: Path):
    """Of the files for one part the largest is taken that fits; where none does, the note says why."""
    states = random_states("sd3", torch.float16)
    path = write_single(
        tmp_path / "m.safetensors", "sd3", {part: state for part, state in states.items() if part != "t5"}
    )
    larger = {name: tensor.float() for name, tensor in states["t5"].items()}
    odd = larger | {
        "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": torch.zeros(32, 2)
    }  # as in umT5
    scaled = larger | {"scaled_fp8": torch.zeros(2)}
    for name, state in (("a", odd), ("t5_scaled", scaled)):
        save_file(state, tmp_path / f"{name}.safetensors")
    alone = open_checkpoint(str(path))
    assert "t5" not in alone.parts and needs(alone) == []
    assert "1 unexpected" in describe(alone) and "fp8 weights with scales" in describe(alone)
    save_file(states["t5"], tmp_path / "b.safetensors")
    assert_equal(open_checkpoint(str(path)), states)


def test_a_folder_whose_t5_cannot_be_used_opens_without_it(tmp_path: Path):
    """The note says why, as for a file beside a single file; another T5 can be named, which must fit."""
    states = random_states("sd3", torch.float16)
    narrow = random_states("sd3", torch.float16, {"t5": replace(SIZES["sd3"]["t5"], width=128)})["t5"]
    for name, state in (("t5", states["t5"]), ("narrow", narrow)):
        save_file(state, tmp_path / f"{name}.safetensors")
    write_folder(tmp_path / "whole", "sd3", states)
    norm = "encoder.final_layer_norm.weight"
    lacking = {name: tensor for name, tensor in states["t5"].items() if name != norm}
    spoilt = {
        "no .safetensors file": lambda file: file.unlink(),
        "1 of 2 shards": lambda file: file.rename(file.with_name("model-00001-of-00002.safetensors")),
        "cut off": lambda file: file.write_bytes(file.read_bytes()[:-1]),
        norm: lambda file: save_file(lacking, file),
        "T5 128 wide": lambda file: save_file(narrow, file),
        "feed_forward_proj": lambda file: file.with_name("config.json").write_text(
            '{"feed_forward_proj": "relu"}'
        ),
    }
    for i, (words, spoil) in enumerate(spoilt.items()):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(i))
        spoil(folder / "text_encoder_3" / "model.safetensors")
        checkpoint = open_checkpoint(str(folder))
        (note,) = checkpoint.problems["t5"]
        assert words in note and f"Optional: t5 is missing ({note}): fetch its sub-folder" in describe(
            checkpoint
        )
        assert checkpoint.parts == ("denoiser", "vae", "clip_l", "clip_g") and needs(checkpoint) == []
        assert_equal(checkpoint, {part: state for part, state in states.items() if part != "t5"})
        assert_equal(open_checkpoint(str(folder), text_encoders=[str(tmp_path / "t5.safetensors")]), states)
        with pytest.raises(WeightsError, match="T5 128 wide does not fit"):
            open_checkpoint(str(folder), text_encoders=[str(tmp_path / "narrow.safetensors")])


def test_a_text_encoder_that_is_named_makes_the_folders_own_unneeded(tmp_path: Path):
    """Here the folder's CLIP-L is a pickle."""
    sizes = SIZES["sd3"] | {"clip_l": replace(SIZES["sd3"]["clip_l"], width=768, heads=12, layers=12)}
    write_folder(tmp_path / "model", "sd3", random_states("sd3", torch.float16))
    (tmp_path / "model" / "text_encoder" / "model.safetensors").rename(
        tmp_path / "model" / "text_encoder" / "model.bin"
    )
    save_file(random_states("sd3", torch.float16, sizes)["clip_l"], tmp_path / "clip.safetensors")
    with pytest.raises(WeightsError, match="only pickles"):
        open_checkpoint(str(tmp_path / "model"))
    with pytest.raises(WeightsError, match="768"):  # it is read, but this denoiser asks for another width
        open_checkpoint(str(tmp_path / "model"), text_encoders=[str(tmp_path / "clip.safetensors")])


def test_metadata_says_what_shapes_cannot(states: dict, family: str, tmp_path: Path):
    config = {
        "family": family, "unet": {"head_width": 32, "groups": 16}, "mmdit": {"head_width": 32}, "t5_length": 20,
        "vae": {"groups": 8, "scaling": 0.5, "shift": 0.25}, "clip_g": {"head_width": 16, "activation": "quick_gelu"},
        "defaults": {"prompt": "a circle", "height": 128, "width": 64, "guidance": 4.5},
    }  # fmt: skip
    checkpoint = open_checkpoint(str(write_single(tmp_path / "x.safetensors", family, states, config)))
    vae, clip_g = checkpoint.config("vae"), checkpoint.config("clip_g")
    assert (vae.groups, vae.scaling, vae.shift) == (8, 0.5, 0.25)
    assert (clip_g.heads, clip_g.activation, checkpoint.config("clip_l").heads) == (8, "quick_gelu", 1)
    assert checkpoint.config("denoiser").heads == ((1, 4) if family == "sdxl" else 4)
    assert checkpoint.defaults == config["defaults"]
    if family == "sd3":
        assert checkpoint.tokenizer("t5")("a red circle").shape == (1, 20)


def test_tokenizers(family: str, single: Path, folder: Path):
    checkpoints = [open_checkpoint(str(path)) for path in (single, folder)]
    for part in [part for part in ("clip_l", "clip_g", "t5") if part in checkpoints[0].parts]:
        ids, others = (checkpoint.tokenizer(part)("a red circle!") for checkpoint in checkpoints)
        assert torch.equal(ids, others)
        assert ids.shape == ((1, 12) if part != "t5" else (1, 256))
    end = SIZES[family]["clip_l"].vocabulary - 1
    assert checkpoints[0].tokenizer("clip_l")("")[0, 1:].tolist() == [end] * 11
    assert checkpoints[0].tokenizer("clip_g")("")[0, 1:].tolist() == [end] + [0] * 10


@pytest.mark.parametrize("pad", ["!", "<|endoftext|>", None])
def test_padding_is_what_the_folder_declares(folder: Path, tmp_path: Path, pad: str | None):
    """`equal` to transformers' ids; bigG's own padding is 0, for a folder that declares nothing."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    theirs = transformers.CLIPTokenizerFast.from_pretrained(
        folder / "tokenizer_2", pad_token=pad or "!", model_max_length=12
    )
    if pad is not None:
        theirs.save_pretrained(tmp_path / "tokenizer_2")
    for text in ("a red circle", "", "a circle ! and! more" if pad == "!" else "so!"):
        ids = theirs(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
        assert (
            pad is None
            and "!" in text
            or torch.equal(open_checkpoint(str(tmp_path)).tokenizer("clip_g")(text), ids)
        )


def test_tokenizers_of_a_folder_saved_by_transformers_5(folder: Path, family: str, tmp_path: Path):
    """It writes tokenizer.json alone."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    saved = transformers.CLIPTokenizerFast.from_pretrained(folder / "tokenizer").backend_tokenizer
    for name in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(tmp_path / name)
        (tmp_path / name).mkdir()
        saved.save(str(tmp_path / name / "tokenizer.json"))
    before, after = open_checkpoint(str(folder)), open_checkpoint(str(tmp_path))
    for part in ("clip_l", "clip_g"):
        assert torch.equal(after.tokenizer(part)("A red circle!"), before.tokenizer(part)("A red circle!"))
    if family == "sd3":
        (tmp_path / "tokenizer_3" / "spiece.model").unlink()
        t5_oracle(folder / "tokenizer_3" / "spiece.model").backend_tokenizer.save(
            str(tmp_path / "tokenizer_3" / "tokenizer.json")
        )
        assert torch.equal(after.tokenizer("t5")("A red circle!"), before.tokenizer("t5")("A red circle!"))


def write_official(path: Path, name: str) -> Path:
    """An official file in full size, all zeros and sparse on the disk."""
    return write_sparse(path / f"{name}.safetensors", tensors(name))


def test_official_files_are_recognised_from_their_headers(tmp_path: Path):
    sdxl = open_checkpoint(str(write_official(tmp_path, "sdxl-base-1.0.single")))
    assert (sdxl.family, sdxl.parts) == ("sdxl", ("denoiser", "vae", "clip_l", "clip_g")) and needs(
        sdxl
    ) == []
    assert sdxl.tokenizer("clip_g")("a photo of a cat")[0, :9].tolist() == [
        49406, 320, 1125, 539, 320, 2368, 49407, 0, 0]  # fmt: skip
    assert sdxl.tokenizer("clip_l")("!")[0, :4].tolist() == [49406, 256, 49407, 49407]
    sd35 = write_official(tmp_path, "sd3.5-medium.single")
    assert open_checkpoint(str(sd35)).parts == ("denoiser", "vae")
    for name in ("clip_l", "clip_g", "t5xxl_fp16"):
        write_official(tmp_path, f"text-encoder.{name}")
    assert open_checkpoint(str(sd35)).parts == ("denoiser", "vae", "clip_l", "clip_g", "t5")
    with pytest.raises(WeightsError, match="Stable Diffusion 1 or 2"):
        open_checkpoint(str(write_official(tmp_path, "sd-1.5.single")))


def test_t5_vocabulary_by_option_from_the_cache_or_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    states = random_states("sd3", torch.float16)
    path = write_single(tmp_path / "x.safetensors", "sd3", states)
    (tmp_path / "spiece.model").rename(tmp_path / "elsewhere")
    (sentence,) = needs(open_checkpoint(str(path)))
    assert "spiece.model" in sentence and "--no-t5" in sentence
    assert needs(open_checkpoint(str(path)), t5=False) == []
    assert needs(open_checkpoint(str(path), t5_file=str(tmp_path / "elsewhere"))) == []
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        "weights.tokenizers.T5_WORDS", (PIECES, PIECES)
    )  # as if it were the official vocabulary
    snapshot = tmp_path / "hub" / "models--google--t5-v1_1-xxl" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    shutil.copy(tmp_path / "elsewhere", snapshot / "spiece.model")
    assert needs(open_checkpoint(str(path))) == []
    model = io.BytesIO()  # another family's order of the first pieces, such as Llama's
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red circle"] * 9),
        model_writer=model,
        vocab_size=12,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    for content in (b"<html>", b"", model.getvalue()):
        (tmp_path / "spiece.model").write_bytes(content)
        assert "cannot be read" in needs(open_checkpoint(str(path)))[0]


def test_choice_of_files_on_the_hub():
    sdxl = ["model_index.json", "sd_xl_base_1.0.safetensors", "unet/config.json", "unet/model.onnx",
            "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
            "vae/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json", "vae_1_0/config.json"]  # fmt: skip
    assert find.wanted(sdxl) == [
        "model_index.json", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/config.json",
        "vae/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json",
    ]  # fmt: skip
    assert find.wanted(["README.md", "model.safetensors"]) == ["model.safetensors"]
    assert find.wanted(["a.safetensors", "b.safetensors"]) == []


def test_a_hub_id_is_fetched(folder: Path, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a stand-in for huggingface_hub that has this folder as a repository."""
    files = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        for file in allow_patterns:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / file, tmp_path / file)
        return str(tmp_path)

    class HfApi:
        def model_info(self, name: str, timeout: float) -> SimpleNamespace:
            if name != "someone/something":
                raise OSError("401 Client Error.\nAccess to it is restricted.")
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    stand_in = SimpleNamespace(HfApi=HfApi, snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    checkpoint = open_checkpoint("someone/something")
    assert (checkpoint.family, needs(checkpoint)) == (family, [])
    with pytest.raises(
        WeightsError, match=r"\(OSError: 401 Client Error\).* `hf download someone/else --local-dir DIR`"
    ):
        open_checkpoint("someone/else")


def test_a_hub_id_is_taken_from_the_cache(
    folder: Path, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    with pytest.raises(WeightsError, match="pip install huggingface_hub"):
        open_checkpoint("someone/something")
    home = tmp_path / "models--someone--something"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    shutil.copytree(folder, home / "snapshots" / "abc")
    assert open_checkpoint("someone/something").family == family
