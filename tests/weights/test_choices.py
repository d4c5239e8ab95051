"""Where a checkpoint leaves a choice, the right one is taken and said; what cannot be run is called what it is.

Files and folders are small ones of tests/small.py; which of two sets of weights counts is compared with diffusers and transformers.
"""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import train_free_sample
from tests.small import FOLDERS, PREFIXES, SIZES, random_states, write_folder, write_single
from tests.weights.test_bad_files import sentence
from weights import find
from weights.describe import describe, needs
from weights.load import open_checkpoint

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def sdxl() -> dict[str, dict[str, Tensor]]:
    return random_states("sdxl", torch.float16)


@pytest.fixture(scope="module")
def sd3() -> dict[str, dict[str, Tensor]]:
    return random_states("sd3", torch.float16)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """The command line in this process: options -> exit status and all that it prints."""

    def run(*options: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train_free_sample.py", *map(str, options)])
        status = train_free_sample.main()
        return status, "".join(capsys.readouterr())

    return run


# Two sets of weights in one sub-folder


def mixed(path: Path, family: str, part: str, new: dict, old_size: str, new_size: str) -> Path:
    """The folder of the new state, in which an old one (everything plus 1) was left; the index is the new one's, if it has one."""
    old = {name: tensor + 1 for name, tensor in new.items()}
    write_folder(path / "old", family, {part: old}, shard_size=old_size)
    write_folder(path / "new", family, {part: new}, shard_size=new_size)
    for file in (path / "old").rglob("*.*"):
        target = path / "new" / file.relative_to(path / "old")
        if not target.exists():
            shutil.copy(file, target)
    return path / "new"


@pytest.mark.parametrize("old_size, new_size", [("4MB", "1MB"), ("10GB", "1MB"), ("1MB", "10GB")])
def test_the_index_says_which_weights_of_a_denoiser_count(
    old_size: str, new_size: str, sdxl: dict, tmp_path: Path
):
    """As in diffusers: an index comes before a whole file, whichever is the older."""
    folder = mixed(tmp_path, "sdxl", "denoiser", sdxl["denoiser"], old_size, new_size)
    reference = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float16)
    checkpoint = open_checkpoint(str(folder))
    loaded = checkpoint.load("denoiser", torch.float16).state_dict()
    assert torch.equal(loaded["input_blocks.0.0.weight"], reference.state_dict()["conv_in.weight"])
    (remark,) = checkpoint.remarks
    assert (
        "several sets of weights: diffusion_pytorch_model-00001-of-" in remark and "index.json says" in remark
    )
    assert remark in describe(checkpoint)


@pytest.mark.parametrize("old_size, new_size", [("10GB", "100KB"), ("100KB", "10GB"), ("200KB", "100KB")])
def test_a_whole_file_of_a_text_encoder_comes_before_an_index(
    old_size: str, new_size: str, sdxl: dict, tmp_path: Path
):
    """As in transformers; of shards alone those count that the index names."""
    write_folder(tmp_path / "whole", "sdxl", {"denoiser": sdxl["denoiser"]})
    folder = mixed(tmp_path, "sdxl", "clip_l", sdxl["clip_l"], old_size, new_size)
    shutil.copytree(tmp_path / "whole" / "unet", folder / "unet")
    reference = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float16)
    checkpoint = open_checkpoint(str(folder))
    loaded = checkpoint.load("clip_l", torch.float16).state_dict()
    bias = next(t for name, t in reference.state_dict().items() if name.endswith("final_layer_norm.bias"))
    assert torch.equal(loaded["text_model.final_layer_norm.bias"], bias)
    (remark,) = checkpoint.remarks
    assert "several sets of weights: model" in remark


def test_weights_under_other_names_are_said_or_refused(sdxl: dict, tmp_path: Path):
    """The usual name counts, and what it leaves aside is named; of several others none is taken."""
    folder = write_folder(tmp_path / "folder", "sdxl", {"denoiser": sdxl["denoiser"]})
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(file, file.with_name("diffusion_pytorch_model_ema.safetensors"))
    (remark,) = open_checkpoint(str(folder)).remarks
    assert (
        "diffusion_pytorch_model.safetensors is taken, diffusion_pytorch_model_ema.safetensors is not"
        in remark
    )
    file.rename(file.with_name("old.safetensors"))
    text = sentence(folder)
    assert (
        "several names (diffusion_pytorch_model_ema.safetensors, old.safetensors)" in text
        and "keep one" in text
    )
    file.with_name("old.safetensors").unlink()
    assert open_checkpoint(str(folder)).remarks == []
    file.with_name(file.name + ".index.json").write_text('{"weight_map": {"a": "missing.safetensors"}}')
    assert "missing.safetensors" in sentence(folder)


def test_the_index_of_a_variant_is_found_under_each_of_its_names(sdxl: dict, tmp_path: Path):
    """diffusers writes .index.fp16.json; older versions put the variant elsewhere. A plain index without its files makes way."""
    write_folder(tmp_path, "sdxl", {"denoiser": sdxl["denoiser"]})
    unet = tmp_path / "unet"
    module = UNet2DConditionModel.from_pretrained(unet, torch_dtype=torch.float16)
    whole = unet / "diffusion_pytorch_model.safetensors"
    old = {key: tensor + 1 for key, tensor in load_file(whole).items()}
    module.save_pretrained(unet, variant="fp16", max_shard_size="4MB")
    whole.unlink(missing_ok=True)
    save_file(old, unet / "diffusion_pytorch_model.fp16.safetensors")
    written = unet / "diffusion_pytorch_model.safetensors.index.fp16.json"
    for name in ("safetensors.index.fp16", "safetensors.fp16.index", "fp16.safetensors.index"):
        index = written.rename(unet / f"diffusion_pytorch_model.{name}.json")
        checkpoint = open_checkpoint(str(tmp_path))
        loaded = checkpoint.load("denoiser", torch.float16).state_dict()
        assert torch.equal(loaded["out.2.bias"], sdxl["denoiser"]["out.2.bias"])
        assert "diffusion_pytorch_model.fp16.safetensors is not" in checkpoint.remarks[0]
        save_file(old, whole)  # the plain weights come first, and are none of that index's business
        loaded = open_checkpoint(str(tmp_path)).load("denoiser", torch.float16).state_dict()
        assert torch.equal(loaded["out.2.bias"], sdxl["denoiser"]["out.2.bias"] + 1)
        whole.unlink()
        written = index
    plain = unet / "diffusion_pytorch_model.safetensors.index.json"
    plain.write_text(json.dumps({"weight_map": {"a": "diffusion_pytorch_model-00001-of-00001.safetensors"}}))
    (remark,) = open_checkpoint(str(tmp_path)).remarks
    assert "0 of the 1 files" in remark and "the variant fp16 beside it is taken" in remark


@pytest.mark.parametrize("content, words", [
    ('{"weight_map": {"a": "diffusion_pytorch_model.safetensors", "b": "gone.safetensors"}}', "holds 1 of the 2 files"),
    ('{"weight_map": {"a": "gone.safetensors"}}', "fetch the others (gone.safetensors)"),
    ('{"weight_map": {"a": "../unet/x.safetensors"}}', "does not list the files"),
    ('{"weight_map": {"a": 1}}', "does not list the files"), ('{"weight_map": {}}', "does not list the files"),
    ('{"weight_map": []}', "does not list the files"), ("{}", "does not list the files"), ("[]", "not a JSON object"),
    ("{", "not valid JSON"),
])  # fmt: skip
def test_an_index_that_names_missing_files_is_refused(content: str, words: str, sdxl: dict, tmp_path: Path):
    """Also where a whole file lies beside it, which would be an older one."""
    write_folder(tmp_path, "sdxl", {"denoiser": sdxl["denoiser"]})
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(content)
    text = sentence(tmp_path)
    assert words in text and "diffusion_pytorch_model.safetensors.index.json" in text


def test_two_sets_of_shards_without_an_index_are_refused(sdxl: dict, tmp_path: Path):
    folder = mixed(tmp_path, "sdxl", "denoiser", sdxl["denoiser"], "4MB", "1MB")
    next((folder / "unet").glob("*.index.json")).unlink()
    assert "no index that says which counts" in sentence(folder)
    gone = next((tmp_path / "old" / "unet").glob("*-00001-of-*.safetensors"))
    (folder / "unet" / gone.name).unlink()  # what is left of the old set is no set
    loaded = open_checkpoint(str(folder)).load("denoiser", torch.float16).state_dict()
    assert torch.equal(loaded["out.2.bias"], sdxl["denoiser"]["out.2.bias"])


def test_the_hub_download_fetches_the_index_of_the_weights_that_it_fetches():
    files = ["text_encoder_3/model-00001-of-00002.safetensors", "text_encoder_3/model-00002-of-00002.safetensors",
             "text_encoder_3/model.safetensors.index.json", "text_encoder_3/model.fp16-00001-of-00001.safetensors",
             "text_encoder_3/model.safetensors.index.fp16.json", "transformer/diffusion_pytorch_model-00001-of-00001.safetensors",
             "transformer/diffusion_pytorch_model.safetensors.index.json"]  # fmt: skip
    assert find.wanted(files) == [*files[5:], *files[3:5]]


# Text encoders beside an SD3 file


@pytest.fixture(scope="module")
def encoders(sd3: dict) -> dict[str, dict[str, Tensor]]:
    """Files that may lie beside an SD3 file. "long": a Long-CLIP, with more positions."""
    key = "text_model.embeddings.position_embedding.weight"
    clip_l, clip_g = sd3["clip_l"], sd3["clip_g"]
    return {
        "l": clip_l, "g": clip_g, "t5": sd3["t5"], "tuned": {name: tensor.float() + 1 for name, tensor in clip_l.items()},
        "long": {name: tensor.float() for name, tensor in clip_l.items()} | {key: torch.rand(40, 64)},
        "long_g": {name: tensor.float() for name, tensor in clip_g.items()} | {key: torch.rand(40, 128)},
        "large_t5": {name: tensor.float() for name, tensor in sd3["t5"].items()},
    }  # fmt: skip


@pytest.mark.parametrize("files, taken", [
    ({"clip_l": "l", "clip_g": "g"}, {"clip_l": "clip_l", "clip_g": "clip_g"}),
    ({"clip_l": "l", "Long": "long", "clip_g": "g"}, {"clip_l": "clip_l", "clip_g": "clip_g"}),
    ({"a": "l", "Long": "long", "g": "g"}, {"clip_l": "a", "clip_g": "g"}),  # the larger one fits no clip_g
    ({"clip_l": "l", "Long": "long", "g": "long_g"}, {"clip_l": "Long", "clip_g": "g"}),  # nor does the official one here
    ({"clip_l": "l", "a_tuned": "tuned", "clip_g": "g"}, {"clip_l": "clip_l", "clip_g": "clip_g"}),
    ({"a": "l", "b_tuned": "tuned", "clip_g": "g"}, {"clip_l": "b_tuned", "clip_g": "clip_g"}),  # the larger
    ({"t5xxl_fp16": "t5", "t5xxl_fp8_e4m3fn": "large_t5", "a": "large_t5"}, {"t5": "t5xxl_fp16"}),
    ({"t5xxl_fp8_e4m3fn": "t5", "a": "large_t5"}, {"t5": "t5xxl_fp8_e4m3fn"}),
    ({"text_encoders/clip_l": "l", "clip_l_tuned": "tuned"}, {"clip_l": "text_encoders/clip_l"}),
    ({"Long": "long", "clip_g": "g"}, {"clip_l": "Long"}),  # nothing fits; clip_g is missing, and the note says why
])  # fmt: skip
def test_text_encoders_that_fit_together_are_taken_and_said(
    files: dict, taken: dict, sd3: dict, encoders: dict, tmp_path: Path
):
    path = write_single(tmp_path / "m.safetensors", "sd3", {part: sd3[part] for part in ("denoiser", "vae")})
    (tmp_path / "text_encoders").mkdir()
    for name, which in files.items():
        save_file(encoders[which], tmp_path / f"{name}.safetensors")
    checkpoint = open_checkpoint(str(path))
    assert set(checkpoint.parts) == {"denoiser", "vae", *taken}
    for part, name in taken.items():
        place = tmp_path / f"{name}.safetensors"
        assert checkpoint.part(part).place == place
        (remark,) = [remark for remark in checkpoint.remarks if remark.startswith(f"{part} from {place}")]
        assert remark in describe(checkpoint).split("\n")
        for other in files:
            known = {"l": "clip_l", "g": "clip_g", "t": "t5"}
            if (
                other != name
                and known.get(files[other].removeprefix("large_").removeprefix("long_")[0], "clip_l") == part
            ):
                assert Path(other).name in remark
    if taken == {"clip_l": "Long"}:
        assert "40 and 12 positions" in needs(checkpoint)[0]


def test_a_run_says_which_text_encoders_it_found(command, sd3: dict, encoders: dict, tmp_path: Path):
    path = write_single(tmp_path / "m.safetensors", "sd3", {part: sd3[part] for part in ("denoiser", "vae")})
    for name, which in {"clip_l": "l", "Long": "long", "clip_g": "g", "t5xxl_fp16": "t5"}.items():
        save_file(encoders[which], tmp_path / f"{name}.safetensors")
    size = "--height", 32, "--width", 32, "--steps", 2, "--prompt", "a red circle"
    status, text = command("--weights", path, "--no-t5", "--out", tmp_path / "p.png", *size)
    assert status == 0 and f"clip_l from {tmp_path}/clip_l.safetensors (also there: Long.safetensors)" in text
    assert f"clip_g from {tmp_path}/clip_g.safetensors\n" in text and "t5 from" not in text


# Schedulers


@pytest.mark.parametrize("family, scheduler, words", [
    ("sdxl", {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "refused: FlowMatchEulerDiscreteScheduler"),
    ("sdxl", {"_class_name": "FlowMatchHeunDiscreteScheduler"}, "refused: FlowMatchHeunDiscreteScheduler"),
    ("sdxl", {"_class_name": "EDMEulerScheduler", "prediction_type": "epsilon"}, "refused: EDMEulerScheduler"),
    ("sdxl", {"_class_name": "EDMDPMSolverMultistepScheduler"}, "refused: EDMDPMSolverMultistepScheduler"),
    ("sdxl", {"_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction"}, "refused: v_prediction"),
    ("sdxl", {"_class_name": "DDIMScheduler", "prediction_type": "sample"}, "refused: sample"),
    ("sdxl", {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"}, "refused: flow_prediction"),
    ("sdxl", {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "refused: use_flow_sigmas"),
    ("sdxl", {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "refused: continuous"),
    ("sdxl", {"_class_name": "LCMScheduler", "prediction_type": "epsilon"}, "LCMScheduler"),
    ("sdxl", {"_class_name": "TCDScheduler"}, "TCDScheduler"), ("sdxl", {"_class_name": 7}, "7"),
    ("sdxl", {"_class_name": "EulerAncestralDiscreteScheduler"}, ""), ("sdxl", {"_class_name": "PNDMScheduler"}, ""),
    ("sdxl", {}, ""), ("sd3", {}, ""), ("sd3", {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, ""),
    ("sd3", {"_class_name": "FlowMatchLCMScheduler"}, "FlowMatchLCMScheduler"),
    ("sd3", {"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon"}, "refused: EulerDiscreteScheduler"),
    ("sd3", {"_class_name": "DPMSolverMultistepScheduler"}, "refused: DPMSolverMultistepScheduler"),
])  # fmt: skip
@pytest.mark.parametrize("place", ["scheduler", "model_index"])
def test_schedulers_of_folders(
    family: str, scheduler: dict, words: str, place: str, small_folders: dict, tmp_path: Path
):
    """Refused by name where they belong to another kind of model, remarked on where the class is none of the usual."""
    shutil.copytree(small_folders[family], tmp_path, dirs_exist_ok=True)
    (tmp_path / "scheduler").mkdir()
    name = scheduler.get("_class_name")
    if place == "model_index":
        scheduler = {key: value for key, value in scheduler.items() if key != "_class_name"}
        (tmp_path / "model_index.json").write_text(
            json.dumps({"scheduler": ["diffusers", name]} if name else {})
        )
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    if words.startswith("refused: "):
        text = sentence(tmp_path)
        assert words.removeprefix("refused: ") in text and str(tmp_path) in text
    else:
        remarks = open_checkpoint(str(tmp_path)).remarks
        assert len(remarks) == bool(words) and all(words in remark for remark in remarks)


@pytest.fixture(scope="module")
def small_folders(sdxl: dict, sd3: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> a folder with nothing but the denoiser."""
    return {
        family: write_folder(tmp_path_factory.mktemp(family), family, {"denoiser": states["denoiser"]})
        for family, states in (("sdxl", sdxl), ("sd3", sd3))
    }


@pytest.mark.parametrize("family, told, words", [
    ("sdxl", "epsilon", None), ("sdxl", "", None), ("sdxl", "v", "v-prediction"), ("sdxl", "V-Prediction", "v-prediction"),
    ("sdxl", "velocity", "v-prediction"), ("sdxl", "flow", "flow"), ("sdxl", "sample", "sample"),
    ("sd3", "velocity", None), ("sd3", "v", None), ("sd3", "rf", None), ("sd3", "epsilon", None),
])  # fmt: skip
def test_the_prediction_in_the_metadata_is_judged_within_its_family(
    family: str, told: str, words: str | None, sdxl: dict, sd3: dict, tmp_path: Path
):
    path = write_single(tmp_path / "m.safetensors", family, {"sdxl": sdxl, "sd3": sd3}[family])
    save_file(load_file(path), path, {"modelspec.prediction_type": told})
    assert words in sentence(path) if words else open_checkpoint(str(path))


# Known surplus, of each part wherever it stands

SURPLUS = {
    "clip_l": [
        "vision_model.post_layernorm.weight",
        "visual_projection.weight",
        "visual.proj",
        "logit_scale",
    ],
    "clip_g": [
        "vision_model.post_layernorm.weight",
        "visual_projection.weight",
        "visual.proj",
        "logit_scale",
    ],
    "t5": [
        "decoder.block.0.layer.0.SelfAttention.q.weight",
        "decoder.final_layer_norm.weight",
        "lm_head.weight",
    ],
    "vae": [
        "loss.discriminator.main.0.weight",
        "loss.logvar",
        "model_ema.decay",
        "model_ema.decoder_conv_in_weight",
    ],
}


@pytest.mark.parametrize("family, part", [("sdxl", "clip_l"), ("sdxl", "clip_g"), ("sdxl", "vae"), ("sd3", "clip_l"),
                                          ("sd3", "clip_g"), ("sd3", "t5"), ("sd3", "vae")])  # fmt: skip
def test_known_surplus_is_ignored_wherever_the_part_stands(
    family: str, part: str, sdxl: dict, sd3: dict, tmp_path: Path
):
    """In a single file, in a folder, in a file named by option and in one beside."""
    states = {"sdxl": sdxl, "sd3": sd3}[family]
    surplus = {name: torch.rand(3) for name in SURPLUS[part]}
    inside = {PREFIXES[family][part] + name: tensor for name, tensor in surplus.items()}
    places = [(write_single(tmp_path / "m.safetensors", family, states, extra=inside), [])]
    folder = write_folder(tmp_path / "folder", family, {"denoiser": states["denoiser"], part: states[part]})
    file = next(iter((folder / FOLDERS[family][part]).glob("*.safetensors")))
    save_file(load_file(file) | surplus, file)
    places.append((folder, []))
    if part != "vae":
        (tmp_path / "alone").mkdir()
        rest = {other: state for other, state in states.items() if other != part}
        alone = write_single(tmp_path / "alone" / "m.safetensors", family, rest)
        save_file(states[part] | surplus, tmp_path / "encoder.safetensors")
        places.append((alone, [str(tmp_path / "encoder.safetensors")]))
        if family == "sd3":
            (tmp_path / "beside").mkdir()
            shutil.copy(alone, tmp_path / "beside")
            shutil.copy(tmp_path / "encoder.safetensors", tmp_path / "beside")
            places.append((tmp_path / "beside" / "m.safetensors", []))
    for path, encoders in places:
        checkpoint = open_checkpoint(str(path), text_encoders=encoders)
        loaded = checkpoint.load(part, torch.float16).state_dict()
        assert loaded.keys() == states[part].keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in states[part].items())


def test_what_is_surplus_in_one_part_is_missed_in_another(sdxl: dict, tmp_path: Path):
    """The autoencoder's decoder is no half of a T5, and a tower for images belongs to no autoencoder."""
    lacking = {name: tensor for name, tensor in sdxl["vae"].items() if name != "decoder.conv_in.bias"}
    assert "1 missing (decoder.conv_in.bias)" in sentence(
        write_single(tmp_path / "a.safetensors", "sdxl", sdxl | {"vae": lacking})
    )
    odd = {"first_stage_model.visual.proj": torch.zeros(2)}
    assert "visual.proj" in sentence(write_single(tmp_path / "b.safetensors", "sdxl", sdxl, extra=odd))


def test_a_clip_l_file_with_both_towers(tmp_path: Path):
    """As openai/clip-vit-large-patch14 has it: beside an SD3 file, and its projection is not applied."""
    sizes = SIZES["sd3"] | {"clip_l": replace(SIZES["sd3"]["clip_l"], width=768, heads=12, layers=12)}
    sizes["denoiser"] = replace(sizes["denoiser"], pooled_width=768 + 128)
    states = random_states("sd3", torch.float16, sizes)
    path = write_single(
        tmp_path / "m.safetensors", "sd3", {part: state for part, state in states.items() if part != "clip_l"}
    )
    full = {"text_projection.weight": torch.rand(768, 768), "visual_projection.weight": torch.rand(768, 1024),
            "vision_model.embeddings.position_ids": torch.arange(257)[None], "logit_scale": torch.tensor(4.6)}  # fmt: skip
    save_file(states["clip_l"] | full, tmp_path / "clip_l.safetensors")
    checkpoint = open_checkpoint(str(path))
    assert needs(checkpoint) == [] and checkpoint.config("clip_l").projection is None


def test_names_by_torch_compile_and_metadata_that_is_null(sdxl: dict, tmp_path: Path):
    path = write_single(tmp_path / "m.safetensors", "sdxl", sdxl)
    stem = "model.diffusion_model."
    stored = {
        key.replace(stem, f"{stem}_orig_mod.") if key.startswith(stem) else f"_orig_mod.{key}": tensor
        for key, tensor in load_file(path).items()
    }
    save_file(stored, path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps({"__metadata__": None} | json.loads(data[8 : 8 + length])).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    checkpoint = open_checkpoint(str(path))
    loaded = checkpoint.load("denoiser", torch.float16).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in sdxl["denoiser"].items())
    save_file(stored | {f"{stem}out.2.bias": torch.zeros(4)}, path)
    assert "model.diffusion_model.out.2.bias' twice" in sentence(path)


def test_a_scaled_t5_inside_a_file_matters_only_where_it_is_used(command, sd3: dict, tmp_path: Path):
    prefix = PREFIXES["sd3"]["t5"]
    scaled = {
        f"{prefix}scaled_fp8": torch.zeros(2),
        f"{prefix}encoder.block.0.layer.0.SelfAttention.q.scale_weight": torch.ones(1),
    }
    path = write_single(tmp_path / "m.safetensors", "sd3", sd3, extra=scaled)
    save_file(sd3["t5"], tmp_path / "other.t5")
    status, text = command("--weights", path, "--check")
    assert (
        status == 1
        and "its t5 holds fp8 weights with scales" in text
        and "--no-t5" in text
        and "--text-encoders" in text
    )
    status, text = command("--weights", path, "--prompt", "x", "--out", tmp_path / "p.png")
    assert (
        status == 2 and "fp8 weights with scales" in text and "--no-t5" in text and "--text-encoders" in text
    )
    status, text = command("--weights", path, "--check", "--no-t5")
    assert status == 0 and "Nothing is missing" in text and "scales" not in text
    checkpoint = open_checkpoint(str(path))
    checkpoint.leave_out("t5")  # as a run with --no-t5 does
    assert needs(checkpoint) == []
    checkpoint = open_checkpoint(str(path), text_encoders=[str(tmp_path / "other.t5")])
    assert needs(checkpoint) == [] and "t5" in checkpoint.parts
    (tmp_path / "other.t5").rename(tmp_path / "t5xxl_fp16.safetensors")
    checkpoint = open_checkpoint(str(path))
    assert needs(checkpoint) == [] and checkpoint.remarks == [f"t5 from {tmp_path}/t5xxl_fp16.safetensors"]


# What it is


def test_an_sdxl_merge_without_text_encoders_is_told_of_the_option(sdxl: dict, tmp_path: Path):
    path = write_single(
        tmp_path / "m.safetensors", "sdxl", {part: sdxl[part] for part in ("denoiser", "vae")}
    )
    missing = needs(open_checkpoint(str(path)))
    assert [text.split()[0] for text in missing] == ["clip_l", "clip_g"]
    assert all("--text-encoders" in text and "beside" not in text for text in missing)
    for part in ("clip_l", "clip_g"):
        save_file(sdxl[part], tmp_path / f"{part}.safetensors")
    files = [str(tmp_path / f"{part}.safetensors") for part in ("clip_l", "clip_g")]
    checkpoint = open_checkpoint(str(path), text_encoders=files)
    assert needs(checkpoint) == [] and f"clip_l from {files[0]}" in describe(checkpoint).split("\n")


def pruned(state: dict[str, Tensor], *gone: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(gone)}


@pytest.mark.parametrize(
    "gone", ["middle_block.", "output_blocks.1.1.", "middle_block.1.", "middle_block.2."]
)
def test_pruned_unets_are_named(gone: str, sdxl: dict, tmp_path: Path):
    """SSD-1B and Segmind Vega have no middle block and other numbers of transformer blocks, others a part of the middle; in both layouts."""
    state = pruned(sdxl["denoiser"], gone)
    text = sentence(write_single(tmp_path / "m.safetensors", "sdxl", sdxl | {"denoiser": state}))
    assert "pruned U-Net" in text and "SSD-1B" in text
    folder = write_folder(tmp_path / "folder", "sdxl", {"denoiser": sdxl["denoiser"]})
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    names = {
        "middle_block.": "mid_block.",
        "output_blocks.1.1.": "up_blocks.0.attentions.1.",
        "middle_block.1.": "mid_block.att",
        "middle_block.2.": "mid_block.resnets.1.",
    }
    save_file(pruned(load_file(file), names[gone]), file)
    assert "pruned U-Net" in sentence(folder)


NF4 = {"weight.absmax": torch.zeros(2), "weight.quant_map": torch.zeros(16),
       "weight.quant_state.bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8)}  # fmt: skip


@pytest.mark.parametrize("added, words", [
    (NF4, "nf4 weights (4 bits, by bitsandbytes)"),
    ({"weight.SCB": torch.zeros(2)}, "int8 weights (by bitsandbytes)"),
    ({"weight_scale": torch.zeros(1), "weight": torch.zeros(8, 8, dtype=torch.int8)}, "int8 weights with scales"),
    ({"scale_weight": torch.zeros(1)}, "fp8 weights with scales"), ({"weight_scale": torch.zeros(1)}, "fp8 weights with scales"),
    ({"qweight": torch.zeros(2), "scales": torch.zeros(2)}, "GPTQ, AWQ or SVDQuant"),
])  # fmt: skip
@pytest.mark.parametrize("part", ["denoiser", "t5", "clip_g"])
def test_quantised_weights_are_named(
    added: dict, words: str, part: str, sd3: dict, small_folders: dict, tmp_path: Path
):
    """In a single file; in a folder (denoiser); in a text encoder that is named."""
    layer = {"denoiser": "joint_blocks.0.x_block.mlp.fc1.", "t5": "encoder.block.0.layer.0.SelfAttention.q.",
             "clip_g": "text_model.encoder.layers.0.mlp.fc1."}[part]  # fmt: skip
    state = sd3[part] | {layer + name: tensor for name, tensor in added.items()}
    path = write_single(tmp_path / "m.safetensors", "sd3", sd3 | {part: state})
    text = needs(open_checkpoint(str(path)))[0] if part == "t5" else sentence(path)
    assert words in text and f"its {part} holds" in text
    if part == "denoiser":
        shutil.copytree(small_folders["sd3"], tmp_path / "folder")
        file = tmp_path / "folder" / "transformer" / "diffusion_pytorch_model.safetensors"
        save_file(
            load_file(file)
            | {f"transformer_blocks.0.ff.net.2.{name}": tensor for name, tensor in added.items()},
            file,
        )
        assert words in sentence(tmp_path / "folder")
    else:
        save_file(state, tmp_path / "encoder.safetensors")
        whole = write_single(tmp_path / "w.safetensors", "sd3", sd3)
        assert words in sentence(whole, text_encoders=[str(tmp_path / "encoder.safetensors")])


@pytest.mark.parametrize("names, words", [
    (["first_stage_model.decoder.conv_in.bias", "first_stage_model.loss.logvar"], "autoencoder alone"),
    (["decoder.conv_in.bias", "encoder.conv_in.bias", "quant_conv.bias"], "autoencoder alone"),
    (["decoder.block.0.layer.0.SelfAttention.q.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"], "text encoder alone"),
    (["first_stage_model.decoder.conv_in.bias", "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"], "no denoiser"),
    (["text_encoders.clip_l.transformer.text_model.final_layer_norm.bias"], "no denoiser"),
    (["first_stage_model.decoder.conv_in.bias", "something"], "no denoiser"),
    (["decoder.conv_in.bias", "something"], "neither"), (["something", "layer.weight.SCB"], "int8"),
])  # fmt: skip
def test_files_are_named_by_all_that_is_in_them(names: list[str], words: str, tmp_path: Path):
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "x.safetensors")
    assert words in sentence(tmp_path / "x.safetensors")
