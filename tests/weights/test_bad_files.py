"""Bad files end in one sentence: never a traceback, a hang or an unpickling."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.mutations import JUNK, MUTATIONS, acceptable, joined, outcome
from tests.official import tensors, write_sparse
from tests.small import random_states, write_folder, write_single
from weights.describe import describe
from weights.load import WeightsError, open_checkpoint

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["sdxl", "sd3"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small whole single file."""
    folder = tmp_path_factory.mktemp(request.param)
    return write_single(folder / "m.safetensors", request.param, random_states(request.param, torch.float16))


def sentence(path: Path | str, **options) -> str:
    """What the user reads."""
    with pytest.raises(WeightsError) as caught:
        open_checkpoint(str(path), **options)
    assert acceptable(str(caught.value))
    return str(caught.value)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
@settings(max_examples=10, phases=[Phase.generate])  # there is nothing to shrink in a seed
@given(seed=st.integers(0, 2**32))
def test_mutated_files_load_or_say_why_not(mutation, whole: Path, tmp_path: Path, seed: int):
    """benchmarks/hardship/fuzz_files.py does the same with as many files as one likes."""
    path = tmp_path / "x.safetensors"
    path.unlink(missing_ok=True)  # an earlier one may be mapped still
    path.write_bytes(mutation(whole.read_bytes(), random.Random(seed)))
    assert acceptable(outcome(path))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(JUNK),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)
SIZES = st.integers(0, 8) | st.integers(2**60, 2**65)
ENTRIES = st.fixed_dictionaries({
    "dtype": st.sampled_from(["F16", "F32", "I8", "F8_E4M3", "F4"]) | JSON,
    "shape": st.lists(SIZES, max_size=3) | JSON,
    "data_offsets": st.lists(SIZES, min_size=2, max_size=2) | JSON,
})  # fmt: skip
NAMES = st.text(max_size=20) | st.sampled_from(
    ["__metadata__", "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"]
)


@settings(max_examples=100)
@given(header=st.dictionaries(NAMES, ENTRIES | JSON, max_size=4) | JSON, body=st.binary(max_size=32))
def test_any_header_is_refused_in_one_sentence(
    header: object, body: bytes, tmp_path_factory: pytest.TempPathFactory
):
    path = tmp_path_factory.mktemp("header") / "x.safetensors"
    path.write_bytes(joined(header, body))
    assert (found := outcome(path)) != "loaded" and acceptable(found)


@pytest.mark.parametrize("content, words", [
    (b"<!DOCTYPE html><html><body>Please log in</body></html>", "web page"),
    (b"\n  <html>" + b" " * 50, "web page"),
    (b"PK\x03\x04" + b"\0" * 100, "pickle"),
    (b"\x80\x02}q\x00X\x05\x00\x00\x00stateq\x01." + b"\0" * 9, "pickle"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ((2**33).to_bytes(8, "little") + b'{"a": 1}', "claims 8,589,934,592"),
    (b"", "too short"), (b"\0" * 64, "not a safetensors file"),
])  # fmt: skip
def test_what_is_no_safetensors_file_is_named(content: bytes, words: str, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert words in sentence(path)


def test_a_cut_off_file_says_so(whole: Path, tmp_path: Path):
    data, path = whole.read_bytes(), tmp_path / "cut.safetensors"
    for size in (20, 1000, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        assert "cut off" in sentence(path)


FLOAT = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize("table, size", [
    ({"a": FLOAT, "b": FLOAT | {"data_offsets": [12, 20]}}, 20), ({"a": FLOAT, "b": FLOAT | {"data_offsets": [4, 12]}}, 12),
    ({"a": FLOAT}, 9), ({"a": FLOAT | {"shape": [3]}}, 8), ({"a": FLOAT | {"shape": [-2]}}, 8),
    ({"a": FLOAT | {"dtype": "F99"}}, 8), ({"a": FLOAT | {"dtype": "F16"}}, 8), ({"a": FLOAT | {"data_offsets": [8, 0]}}, 8),
    ({"a": [1]}, 0), ({"__metadata__": {"prompt": 1}, "a": FLOAT}, 8),
], ids=["gap", "overlap", "rest", "shape", "negative", "unknown", "width", "backwards", "list", "metadata"])  # fmt: skip
def test_a_header_that_does_not_fit_its_file_is_refused(table: dict, size: int, tmp_path: Path):
    """safetensors finds these, in the oldest version that pyproject.toml names as well."""
    (tmp_path / "x.safetensors").write_bytes(joined(table, bytes(size)))
    assert "cut off or damaged" in sentence(tmp_path / "x.safetensors")


def test_a_name_that_occurs_twice_is_refused(tmp_path: Path):
    """safetensors would take the last one; so would Python."""
    entry = json.dumps(FLOAT)
    for text, words in (
        (f'{{"a": {entry}, "a": {entry}}}', "a name occurs twice"),
        (f'{{"__metadata__": {{"x": "1", "x": "2"}}, "a": {entry}}}', "a name occurs twice"),
        (f'{{"a": {entry}, "_orig_mod.a": {entry.replace("[0, 8]", "[8, 16]")}}}', "twice, with and without"),
    ):
        data = len(text).to_bytes(8, "little") + text.encode() + bytes(16 if "_orig" in text else 8)
        (tmp_path / "x.safetensors").write_bytes(data)
        assert words in sentence(tmp_path / "x.safetensors")


def test_missing_extra_and_misshaped_tensors_are_listed_together(tmp_path: Path):
    states = random_states("sd3", torch.float16)
    denoiser = states["denoiser"]
    del denoiser["joint_blocks.1.x_block.attn.qkv.bias"]
    denoiser["joint_blocks.1.x_block.attn.odd"] = torch.zeros(3)
    denoiser["final_layer.linear.bias"] = torch.zeros(7)
    denoiser["t_embedder.mlp.0.bias"] = torch.zeros(128, dtype=torch.int64)
    text = sentence(write_single(tmp_path / "x.safetensors", "sd3", states))
    for words in (
        "1 missing (joint_blocks.1.x_block.attn.qkv.bias)",
        "1 unexpected (joint_blocks.1.x_block.attn.odd)",
        "1 mis-shaped (final_layer.linear.bias: [7] instead of [64])",
        "(t_embedder.mlp.0.bias: I64)",
    ):
        assert words in text


def test_what_a_folder_lacks_has_the_official_name_and_the_sentence_says_so(tmp_path: Path):
    """Query, key and value make up one tensor there; what is unexpected has the folder's names."""
    write_folder(tmp_path, "sd3", {"denoiser": random_states("sd3", torch.float16)["denoiser"]})
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    stored = load_file(file)
    del stored["transformer_blocks.1.attn.to_q.bias"]
    save_file(stored | {"transformer_blocks.1.attn.odd": torch.zeros(3)}, file)
    text = sentence(tmp_path)
    assert "1 missing, named as in the official single file (joint_blocks.1.x_block.attn.qkv.bias)" in text
    assert "1 unexpected (transformer_blocks.1.attn.odd)" in text


@pytest.mark.parametrize("names, words", [
    (["lora_unet_down_blocks_0.lora_up.weight"], "LoRA"),
    (["unet.up_blocks.0.attn1.to_q.lora_A.weight"], "LoRA"),
    (["control_model.input_hint_block.0.weight"], "ControlNet"),
    (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "Flux"),
    (["model.diffusion_model.scaled_fp8", "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.scale_weight"], "fp8 weights with scales"),
    (["conditioner.embedders.0.model.ln_final.bias", "model.diffusion_model.label_emb.0.0.weight"], "refiner"),
    (["first_stage_model.decoder.conv_in.bias"], "autoencoder alone"),
    (["down_blocks.0.resnets.0.conv1.bias"], "Hugging Face naming"), (["x"], "neither"),
])  # fmt: skip
def test_other_kinds_of_file_are_named(names: list[str], words: str, tmp_path: Path):
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "x.safetensors")
    assert words in sentence(tmp_path / "x.safetensors")


def test_variants_that_would_give_noise_are_refused(tmp_path: Path):
    states = random_states("sdxl", torch.float16)
    for name in ("v_pred", "ztsnr", "edm_vpred.sigma_max"):
        path = write_single(tmp_path / "v.safetensors", "sdxl", states, extra={name: torch.zeros(0)})
        assert "v-prediction" in sentence(path)
    for kind in ("epsilon", "v"):
        path = write_sparse(
            tmp_path / "m.safetensors", tensors("sdxl-base-1.0.single"), {"modelspec.prediction_type": kind}
        )
        assert "v-prediction" in sentence(path) if kind == "v" else open_checkpoint(str(path))
    wide = torch.zeros(64, 9, 3, 3, dtype=torch.float16)
    states["denoiser"]["input_blocks.0.0.weight"] = wide
    assert "inpainting" in sentence(write_single(tmp_path / "i.safetensors", "sdxl", states))


def test_parts_that_do_not_fit_each_other(tmp_path: Path):
    states = random_states("sd3", torch.float16)
    path = write_single(tmp_path / "x.safetensors", "sd3", states)
    clip_g = write_sparse(tmp_path / "g.safetensors", tensors("text-encoder.clip_g"))
    assert "do not fit an MMDiT" in sentence(path, text_encoders=[str(clip_g)])


def test_folders_without_their_parts(tmp_path: Path):
    assert "neither unet/ nor transformer/" in sentence(tmp_path)
    (tmp_path / "unet").mkdir()
    assert "no .safetensors file" in sentence(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"PK\x03\x04")
    assert "only pickles" in sentence(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert "neither SDXL's U-Net nor SD3's MMDiT" in sentence(tmp_path)


def test_other_models_in_folders(tmp_path: Path):
    """Stable Diffusion 1, and what tells the refiner: it reads bigG alone, 1280 wide."""
    write_sparse(tmp_path / "sd1" / "unet" / "diffusion_pytorch_model.safetensors", tensors("sd-1.5.hf.unet"))
    assert "Stable Diffusion 1 or 2" in sentence(tmp_path / "sd1")
    refiner = {"add_embedding.linear_1.weight": ("F16", (1536, 2560)),
               "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": ("F16", (1536, 1280))}  # fmt: skip
    write_sparse(tmp_path / "refiner" / "unet" / "diffusion_pytorch_model.safetensors", refiner)
    assert "refiner" in sentence(tmp_path / "refiner")


@pytest.mark.parametrize("part, text", [("unet", '{"norm_eps": 1e-06}'), ("unet", '{"flip_sin_to_cos": false}'), ("vae", '{"latents_mean": [0, 0, 0, 0]}'),
                                        ("text_encoder", '{"layer_norm_eps": 1e-06}')])  # fmt: skip
def test_a_config_json_that_asks_for_what_is_not_done_here(part: str, text: str, tmp_path: Path):
    write_folder(tmp_path, "sdxl", random_states("sdxl", torch.float16))
    (tmp_path / part / "config.json").write_text(text)
    assert f"{text.split(chr(34))[1]} = " in sentence(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"norm_num_groups": "x"}', '{"attention_head_dim": [1]}', "\udcff",
                                  '{"attention_head_dim": 7}', '{"norm_num_groups": 7}'])  # fmt: skip
def test_a_bad_config_json(text: str, tmp_path: Path):
    write_folder(tmp_path, "sdxl", {"denoiser": random_states("sdxl", torch.float16)["denoiser"]})
    (tmp_path / "unet" / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "unet" in sentence(tmp_path)


@pytest.mark.parametrize("value", ['"no"', "null", "0"])
def test_a_bad_model_index(value: str, tmp_path: Path):
    write_folder(tmp_path, "sdxl", {"denoiser": random_states("sdxl", torch.float16)["denoiser"]})
    (tmp_path / "model_index.json").write_text(f'{{"force_zeros_for_empty_prompt": {value}}}')
    assert "must be true or false" in sentence(tmp_path)


@pytest.mark.parametrize("field, fits", [('"use_dynamic_shifting": true', False), ('"use_karras_sigmas": true', False),
                                         ('"use_dynamic_shifting": false, "shift_terminal": null', True)])  # fmt: skip
def test_schedules_of_sd3_folders(field: str, fits: bool, tmp_path: Path):
    """What diffusers writes for SD3 itself is taken, its shift too; another schedule is refused by name."""
    write_folder(tmp_path, "sd3", {"denoiser": random_states("sd3", torch.float16)["denoiser"]})
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(f'{{"shift": 2.5, {field}}}')
    if fits:
        assert open_checkpoint(str(tmp_path)).defaults == {"shift": 2.5}
    else:
        assert field.split('"')[1] in sentence(tmp_path)


OFFICIAL = """{"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
"beta_start": 0.00085, "clip_sample": false, "interpolation_type": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon",
"sample_max_value": 1.0, "set_alpha_to_one": false, "skip_prk_steps": true, "steps_offset": 1, "timestep_spacing": "leading",
"trained_betas": null, "use_karras_sigmas": false}"""


@pytest.mark.parametrize("field", [None, '"timestep_spacing": "trailing"', '"use_karras_sigmas": true', '"beta_end": 0.02',
                                   '"rescale_betas_zero_snr": true', '"prediction_type": "v_prediction"'])  # fmt: skip
def test_schedules_of_sdxl_folders(field: str | None, tmp_path: Path):
    """The official one is taken; how the model was trained must fit; how it is sampled is remarked on."""
    write_folder(tmp_path, "sdxl", {"denoiser": random_states("sdxl", torch.float16)["denoiser"]})
    (tmp_path / "scheduler").mkdir()
    told = json.loads(OFFICIAL) | (json.loads(f"{{{field}}}") if field else {})
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(told))
    name = field.split('"')[1] if field else ""
    if name in ("beta_end", "rescale_betas_zero_snr", "prediction_type"):
        assert name in sentence(tmp_path)
    else:
        checkpoint = open_checkpoint(str(tmp_path))
        assert len(checkpoint.remarks) == bool(field) and all(name in remark for remark in checkpoint.remarks)
        assert not field or checkpoint.remarks[0] in describe(checkpoint)


def test_what_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "\udcff.safetensors").write_bytes(b"x" * 99)
    assert "rename it" in sentence(tmp_path / "\udcff.safetensors")
    names = (
        "nothing",
        "no/such/file.safetensors",
        "a\0b",
        "",
        "x" * 5000,
        "demo-sd4",
        "/dev/null",
        "~nobody.here/x",
    )
    for name in names:
        sentence(name)
    os.mkfifo(tmp_path / "pipe.safetensors")  # must not wait for a writer
    assert "not a file" in sentence(tmp_path / "pipe.safetensors")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    sentence(tmp_path / "loop.safetensors")
    path = write_sparse(tmp_path / "x.safetensors", {"a": ("F16", (1,))})

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # a real one would not stop root
    assert "Permission denied" in sentence(path)
