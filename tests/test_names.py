"""At full size on the meta device the networks have exactly the official names and shapes; every comparison is `equal`.

The sizes are sniffed from the names and shapes of the official files, and come out as the official configs; the rules
of weights/layouts.py say of every tensor of both layouts the same as the official maps.
"""

import math
from collections.abc import Callable

import pytest
from official import data, shapes

from models.autoencoder import AutoencoderConfig
from models.clip import CLIP_BIGG, CLIP_L
from models.mmdit import MMDiTConfig
from models.t5 import T5Config
from models.unet import UNetConfig
from weights import sniff
from weights.layouts import Source, translate
from weights.check import build
from weights.parts import PREFIXES

DENOISER, VAE = "model.diffusion_model.", "first_stage_model."
SDXL, SD3, SD35, SD1 = (
    "sdxl-base-1.0.single", "sd3-medium-incl-clips-t5xxlfp16.single", "sd3.5-medium.single", "sd-1.5.single",
)  # fmt: skip
SD1_UNET = UNetConfig(multipliers=(1, 2, 4, 4), depths=(1, 1, 1, 0), middle_depth=1, heads=(8, 8, 8, 8),
                      context_width=768, vector_width=None, linear_projections=False)  # fmt: skip
SD3_VAE = AutoencoderConfig(latent_channels=16, quant_convs=False, scaling=1.5305, shift=0.0609)
SD35_MMDIT = MMDiTConfig(positions=384, qk_norm=True, dual_blocks=13)
SNIFFERS = {"unet": sniff.unet, "mmdit": sniff.mmdit, "t5": sniff.t5}


def clip_l(names: sniff.Shapes):
    return sniff.clip(names, "quick_gelu")


def clip_g(names: sniff.Shapes):
    return sniff.clip(names, "gelu")


def vae(family: str):
    return lambda names: sniff.autoencoder(names, family)


CASES = {  # kind, config, sniffer, single file, prefix, folder file, map
    "sdxl unet": ("unet", UNetConfig(), sniff.unet, SDXL, DENOISER, "sdxl-base-1.0.hf.unet", "sdxl.unet"),
    "sdxl vae": ("vae", AutoencoderConfig(), vae("sdxl"), SDXL, VAE, "sdxl-base-1.0.hf.vae", "sdxl.vae"),
    "sdxl clip_l": ("clip", CLIP_L, clip_l, SDXL, PREFIXES["sdxl"]["clip_l"], "sdxl-base-1.0.hf.text_encoder",
                    "sdxl.text_encoder"),
    "sdxl clip_g": ("clip", CLIP_BIGG, clip_g, SDXL, PREFIXES["sdxl"]["clip_g"], "sdxl-base-1.0.hf.text_encoder_2",
                    "sdxl.text_encoder_2"),
    "sd3 mmdit": ("mmdit", MMDiTConfig(), sniff.mmdit, SD3, DENOISER, "sd3-medium.hf.transformer",
                  "sd3-medium.transformer"),
    "sd3 vae": ("vae", SD3_VAE, vae("sd3"), SD3, VAE, "sd3-medium.hf.vae", "sd3-medium.vae"),
    "sd3 clip_g": ("clip", CLIP_BIGG, clip_g, SD3, PREFIXES["sd3"]["clip_g"], "sd3-medium.hf.text_encoder_2",
                   "sd3-medium.text_encoder_2"),
    "sd3 t5": ("t5", T5Config(), sniff.t5, SD3, PREFIXES["sd3"]["t5"], "sd3-medium.hf.text_encoder_3",
               "sd3-medium.text_encoder_3"),
    "sd3.5 mmdit": ("mmdit", SD35_MMDIT, sniff.mmdit, SD35, DENOISER, "sd3.5-medium.hf.transformer",
                    "sd3.5-medium.transformer"),
    "sd1 unet": ("unet", SD1_UNET, sniff.unet, SD1, DENOISER, "sd-1.5.hf.unet", "sd-1.5.unet"),
}  # fmt: skip


def translated(kind: str, names: dict) -> tuple[dict[str, tuple[int, ...]], dict[str, Source]]:
    """Module names and shapes that a file's names and shapes give."""
    sources, unexpected = translate(kind, names)
    assert not unexpected
    return {name: s.shape([names[key] for key in s.keys]) for name, s in sources.items()}, sources


def check(kind: str, names: dict, sniffer: Callable, config: object) -> None:
    """The sniffed config is the official one, and its network has the file's names and shapes."""
    given, _ = translated(kind, names)
    assert sniffer(given) == config
    assert {name: tuple(t.shape) for name, t in build(kind, config).state_dict().items()} == given


@pytest.mark.parametrize("case", CASES)
def test_official_names_and_shapes(case: str):
    kind, config, sniffer, single, prefix, folder, _ = CASES[case]
    check(kind, shapes(single, prefix), sniffer, config)
    check(kind, shapes(folder), sniffer, config)


@pytest.mark.parametrize("case", [case for case in CASES if case != "sdxl clip_g"])
def test_names_equal_the_single_file_with_nothing_but_the_prefix_removed(case: str):
    kind, config, _, single, prefix, _, _ = CASES[case]
    official = set(shapes(single, prefix)) - {
        "text_model.embeddings.position_ids",
        "encoder.embed_tokens.weight",
    }
    assert set(build(kind, config).state_dict()) == official


@pytest.mark.parametrize("name, kind, sniffer, config", [
    ("text-encoder.clip_l", "clip", clip_l, CLIP_L), ("text-encoder.clip_g", "clip", clip_g, CLIP_BIGG),
    ("text-encoder.t5xxl_fp16", "t5", sniff.t5, T5Config()),
])  # fmt: skip
def test_separate_text_encoders(name: str, kind: str, sniffer: Callable, config: object):
    check(kind, shapes(name), sniffer, config)


def test_sd35_large_has_its_published_number_of_parameters():
    config = MMDiTConfig(width=2432, depth=38, heads=38, qk_norm=True)
    names = {name: tuple(tensor.shape) for name, tensor in build("mmdit", config).state_dict().items()}
    assert sniff.mmdit(names) == config
    assert sum(math.prod(shape) for shape in names.values()) == 8_146_280_768


def test_clip_l_of_the_sd3_folder_has_a_projection():
    given, _ = translated("clip", shapes("sd3-medium.hf.text_encoder"))
    assert clip_l(given).projection == 768


@pytest.mark.parametrize("case", CASES)
def test_both_layouts_agree_with_the_official_map(case: str):
    kind, _, _, single, prefix, folder, name = CASES[case]
    _, ours = translated(kind, shapes(single, prefix))
    _, theirs = translated(kind, shapes(folder))
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
