"""At full size on the meta device the networks have exactly the official names and shapes; every comparison is `equal`.

The sizes are read off the names and shapes of the official files, and come out as the official configs; the rules
of weights/names.py say of every tensor of both layouts the same as the official maps.
"""

import math

import pytest

from models import family_of
from models.autoencoder import AutoencoderConfig
from models.clip import CLIP_BIGG, CLIP_L, CLIPText
from models.family import Part
from models.mmdit import MMDiTConfig
from models.t5 import T5Config
from models.unet import UNet, UNetConfig
from tests.official import data, shapes
from weights.check import build
from weights.names import Source, translate

DENOISER, VAE = "model.diffusion_model.", "first_stage_model."
SDXL, SD3, SD35, SD1 = (
    "sdxl-base-1.0.single", "sd3-medium-incl-clips-t5xxlfp16.single", "sd3.5-medium.single", "sd-1.5.single",
)  # fmt: skip
SD1_UNET = UNetConfig(multipliers=(1, 2, 4, 4), depths=(1, 1, 1, 0), middle_depth=1, heads=(8, 8, 8, 8),
                      context_width=768, vector_width=None, linear_projections=False)  # fmt: skip
SD3_VAE = AutoencoderConfig(latent_channels=16, quant_convs=False, scaling=1.5305, shift=0.0609)
SD35_MMDIT = MMDiTConfig(positions=384, qk_norm=True, dual_blocks=13)
SDXL_PARTS, SD3_PARTS = (family_of(name).parts for name in ("sdxl", "sd3"))
SD1_PART = Part(UNet, DENOISER, "unet")
CASES = {  # part, config, single file, folder file, map
    "sdxl unet": (SDXL_PARTS["denoiser"], UNetConfig(), SDXL, "sdxl-base-1.0.hf.unet", "sdxl.unet"),
    "sdxl vae": (SDXL_PARTS["vae"], AutoencoderConfig(), SDXL, "sdxl-base-1.0.hf.vae", "sdxl.vae"),
    "sdxl clip_l": (SDXL_PARTS["clip_l"], CLIP_L, SDXL, "sdxl-base-1.0.hf.text_encoder", "sdxl.text_encoder"),
    "sdxl clip_g": (SDXL_PARTS["clip_g"], CLIP_BIGG, SDXL, "sdxl-base-1.0.hf.text_encoder_2", "sdxl.text_encoder_2"),
    "sd3 mmdit": (SD3_PARTS["denoiser"], MMDiTConfig(), SD3, "sd3-medium.hf.transformer", "sd3-medium.transformer"),
    "sd3 vae": (SD3_PARTS["vae"], SD3_VAE, SD3, "sd3-medium.hf.vae", "sd3-medium.vae"),
    "sd3 clip_g": (SD3_PARTS["clip_g"], CLIP_BIGG, SD3, "sd3-medium.hf.text_encoder_2", "sd3-medium.text_encoder_2"),
    "sd3 t5": (SD3_PARTS["t5"], T5Config(), SD3, "sd3-medium.hf.text_encoder_3", "sd3-medium.text_encoder_3"),
    "sd3.5 mmdit": (SD3_PARTS["denoiser"], SD35_MMDIT, SD35, "sd3.5-medium.hf.transformer", "sd3.5-medium.transformer"),
    "sd1 unet": (SD1_PART, SD1_UNET, SD1, "sd-1.5.hf.unet", "sd-1.5.unet"),
}  # fmt: skip


def translated(part: Part, names: dict) -> tuple[dict[str, tuple[int, ...]], dict[str, Source]]:
    """Module names and shapes that a file's names and shapes give."""
    sources, unexpected = translate(part.network, names)
    assert not unexpected
    return {name: s.shape([names[key] for key in s.keys]) for name, s in sources.items()}, sources


def check(part: Part, names: dict, config: object) -> None:
    """The config read off the shapes is the official one, and its network has the file's names and shapes."""
    given, _ = translated(part, names)
    assert part.network.Config.from_shapes(given, part.given) == config
    built = build(part.network, config).state_dict()
    assert {name: tuple(t.shape) for name, t in built.items()} == given


@pytest.mark.parametrize("case", CASES)
def test_official_names_and_shapes(case: str):
    part, config, single, folder, _ = CASES[case]
    check(part, shapes(single, part.prefix), config)
    check(part, shapes(folder), config)


@pytest.mark.parametrize("case", [case for case in CASES if case != "sdxl clip_g"])
def test_names_equal_the_single_file_with_nothing_but_the_prefix_removed(case: str):
    part, config, single, _, _ = CASES[case]
    official = set(shapes(single, part.prefix)) - {
        "text_model.embeddings.position_ids",
        "encoder.embed_tokens.weight",
    }
    assert set(build(part.network, config).state_dict()) == official


@pytest.mark.parametrize("name, part, config", [
    ("text-encoder.clip_l", "clip_l", CLIP_L), ("text-encoder.clip_g", "clip_g", CLIP_BIGG),
    ("text-encoder.t5xxl_fp16", "t5", T5Config()),
])  # fmt: skip
def test_separate_text_encoders(name: str, part: str, config: object):
    check(SD3_PARTS[part], shapes(name), config)
    assert family_of("sd3").text_encoder(shapes(name)) == part


def test_sd35_large_has_its_published_number_of_parameters():
    config, network = MMDiTConfig(width=2432, depth=38, heads=38, qk_norm=True), SD3_PARTS["denoiser"].network
    names = {name: tuple(tensor.shape) for name, tensor in build(network, config).state_dict().items()}
    assert MMDiTConfig.from_shapes(names) == config
    assert sum(math.prod(shape) for shape in names.values()) == 8_146_280_768


def test_clip_l_of_the_sd3_folder_has_a_projection():
    given, _ = translated(SD3_PARTS["clip_l"], shapes("sd3-medium.hf.text_encoder"))
    assert CLIPText.Config.from_shapes(given).projection == 768


@pytest.mark.parametrize("case", CASES)
def test_both_layouts_agree_with_the_official_map(case: str):
    part, _, single, folder, name = CASES[case]
    prefix = part.prefix
    _, ours = translated(part, shapes(single, prefix))
    _, theirs = translated(part, shapes(folder))
    assert ours.keys() == theirs.keys()
    operations = {
        ("copy", "copy"): "copy",
        ("copy", "swap"): "swap2",
        ("copy", "conv"): "squeeze11",
        ("transpose", "copy"): "T",
    }  # (single, folder) -> the map's word
    found = set()
    for name_, source in ours.items():
        other = theirs[name_]
        if other.how == "concat":
            found |= {(source.keys[0], key, f"rows {i}/3") for i, key in enumerate(other.keys)}
        elif source.how.startswith("third"):
            found.add((source.keys[0], other.keys[0], f"rows {source.how[-1]}/3"))
        else:
            found.add((source.keys[0], other.keys[0], operations[source.how, other.how]))
    expected = data()["maps"][name].items()
    assert found == {(key.removeprefix(prefix), to, how) for key, targets in expected for to, how in targets}
