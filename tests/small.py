"""Small random checkpoints for the tests: the official single file, and the same weights as a Hugging Face folder.

The folder is written by diffusers' and transformers' own `save_pretrained`, so that its names are theirs; the weights
get there by undoing the rules of weights/names.py, which test_networks.py and test_names.py hold against the
originals.
"""

import json
import shutil
from pathlib import Path

import sentencepiece
import torch
import transformers
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

import weights.demo
from hybridiff.switching import SwitchRule
from models import FAMILIES
from models.autoencoder import AutoencoderConfig
from models.clip import CLIPConfig, CLIPText
from models.mmdit import MMDiTConfig
from models.t5 import T5Config
from models.unet import UNetConfig
from weights.check import build
from weights.names import Source, translate

PREFIXES, FOLDERS, NETWORKS = (
    {family.name: {name: getattr(part, what) for name, part in family.parts.items()} for family in FAMILIES}
    for what in ("prefix", "folder", "network")
)  # family -> part -> ...
RULES = {family.name: SwitchRule(**family.switch) for family in FAMILIES}  # the paper's, at 50 steps
DEMO = Path(weights.demo.__file__).parent  # its tokenizers serve here too
WORDS = len(json.loads((DEMO / "vocab.json").read_text()))
PIECES = sentencepiece.SentencePieceProcessor(model_file=str(DEMO / "spiece.model")).vocab_size()
CLIP = dict(vocabulary=WORDS, positions=12, layers=2, mlp_width=96)
CLIPS = {
    "clip_l": CLIPConfig(width=64, heads=1, **CLIP),
    "clip_g": CLIPConfig(width=128, heads=2, activation="gelu", projection=128, **CLIP),
}
SIZES = {  # head width 64 and 32 groups, so that nothing but the shapes need be known
    "sdxl": CLIPS | {
        "denoiser": UNetConfig(channels=64, multipliers=(1, 2), blocks=1, depths=(0, 1), middle_depth=1, heads=(1, 2),
                               context_width=192, vector_width=128 + 6 * 16),
        "vae": AutoencoderConfig(channels=32, multipliers=(1, 1, 2), blocks=1),
    },
    "sd3": CLIPS | {
        "denoiser": MMDiTConfig(width=128, depth=3, heads=2, context_width=256, pooled_width=192, positions=12),
        "vae": AutoencoderConfig(channels=32, multipliers=(1, 1, 2), blocks=1, latent_channels=16, quant_convs=False,
                                 scaling=1.5305, shift=0.0609),
        "t5": T5Config(vocabulary=PIECES, width=256, layers=2, heads=2, head_width=32, mlp_width=160),
    },
}  # fmt: skip


def openclip_keys(layers: int) -> list[str]:
    """Names of an OpenCLIP text tower (mlfoundations/open_clip, TextTransformer)."""
    inside = [f"{layer}.{kind}" for layer in ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
              for kind in ("weight", "bias")] + ["attn.in_proj_weight", "attn.in_proj_bias"]  # fmt: skip
    ends = [
        "token_embedding.weight",
        "positional_embedding",
        "ln_final.weight",
        "ln_final.bias",
        "text_projection",
    ]
    return ends + [f"transformer.resblocks.{i}.{name}" for i in range(layers) for name in inside]


def undo(sources: dict[str, Source], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors that the rules make the module's state from."""
    tensors: dict[str, Tensor] = {}
    thirds: dict[str, list[Tensor]] = {}
    for name, source in sorted(sources.items(), key=lambda item: item[1].how):  # thirds in their order
        tensor = state[name]
        if source.how == "concat":
            tensors |= zip(source.keys, tensor.chunk(3))
        elif source.how.startswith("third"):
            thirds.setdefault(source.keys[0], []).append(tensor)
        else:
            ((key,), how) = source.keys, source.how
            tensors[key] = {"copy": lambda t: t, "swap": lambda t: torch.cat(t.chunk(2)[::-1]),
                            "transpose": lambda t: t.T, "conv": lambda t: t[:, :, 0, 0]}[how](tensor)  # fmt: skip
    tensors |= {key: torch.cat(parts) for key, parts in thirds.items()}
    return {key: tensor.contiguous().clone() for key, tensor in tensors.items()}


def random_states(family: str, dtype: torch.dtype, sizes: dict | None = None) -> dict[str, dict[str, Tensor]]:
    """Part -> module name -> seeded random tensor."""
    generator = torch.Generator().manual_seed(0)
    states = {}
    for part, config in (sizes or SIZES[family]).items():
        shapes = build(NETWORKS[family][part], config).state_dict()
        states[part] = {
            name: (0.1 * torch.randn(t.shape, generator=generator) + name.endswith("norm.weight")).to(dtype)
            for name, t in shapes.items()
        }
    return states


def write_single(
    path: Path,
    family: str,
    states: dict[str, dict[str, Tensor]],
    config: dict | None = None,
    extra: dict | None = None,
) -> Path:
    """The official single file, CLIP's and T5's tokenizer files beside it; `extra` tensors are added as they are."""
    tensors = dict(extra or {})
    for part, state in states.items():
        if (family, part) == ("sdxl", "clip_g"):
            keys = openclip_keys(SIZES[family][part].layers)
            state = undo(translate(CLIPText, keys)[0], state) | {"logit_scale": torch.tensor(4.6)}
        if part == "t5":
            state = state | {"encoder.embed_tokens.weight": state["shared.weight"].clone()}
        tensors |= {PREFIXES[family][part] + name: tensor for name, tensor in state.items()}
    save_file(tensors, path, {"hybridiff.config": json.dumps(config)} if config else {})
    for name in ("vocab.json", "merges.txt", "spiece.model"):
        shutil.copy(DEMO / name, path.parent)
    return path


def theirs(family: str, part: str) -> nn.Module:
    """The class of diffusers or transformers with the sizes of SIZES."""
    c = SIZES[family][part]
    if part == "vae":
        levels = len(c.multipliers)
        return AutoencoderKL(
            block_out_channels=[c.channels * m for m in c.multipliers], layers_per_block=c.blocks, norm_num_groups=32,
            down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
            latent_channels=c.latent_channels, use_quant_conv=c.quant_convs, use_post_quant_conv=c.quant_convs,
            scaling_factor=c.scaling, shift_factor=c.shift or None,
        )  # fmt: skip
    if part in CLIPS:
        sizes = transformers.CLIPTextConfig(
            vocab_size=c.vocabulary, hidden_size=c.width, intermediate_size=c.mlp_width, num_hidden_layers=c.layers,
            num_attention_heads=c.heads, max_position_embeddings=c.positions, hidden_act=c.activation,
            projection_dim=c.projection or 1, bos_token_id=0, eos_token_id=2, pad_token_id=1,
        )  # fmt: skip
        return (transformers.CLIPTextModelWithProjection if c.projection else transformers.CLIPTextModel)(
            sizes
        )
    if part == "t5":
        return transformers.T5EncoderModel(transformers.T5Config(
            vocab_size=c.vocabulary, d_model=c.width, d_kv=c.head_width, d_ff=c.mlp_width, num_layers=c.layers,
            num_heads=c.heads, feed_forward_proj="gated-gelu",
        ))  # fmt: skip
    if family == "sdxl":
        return UNet2DConditionModel(
            block_out_channels=(64, 128), layers_per_block=1, transformer_layers_per_block=(1, 1),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(1, 2), use_linear_projection=True,
            cross_attention_dim=192, addition_embed_type="text_time", addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=128 + 6 * 16,
        )  # fmt: skip
    return SD3Transformer2DModel(
        patch_size=2, in_channels=16, num_layers=3, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=256, caption_projection_dim=128, pooled_projection_dim=192, out_channels=16,
        pos_embed_max_size=12,
    )  # fmt: skip


def write_folder(
    path: Path, family: str, states: dict[str, dict[str, Tensor]], shard_size: str = "10GB"
) -> Path:
    """The Hugging Face folder, with the demo's tokenizer files."""
    for part, state in states.items():
        module, folder = theirs(family, part), path / FOLDERS[family][part]
        names = module.state_dict()
        sources, unexpected = translate(NETWORKS[family][part], names)
        assert not unexpected
        tensors = undo(sources, state)
        if part == "t5" and "encoder.embed_tokens.weight" in names:
            tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
        module = module.to(next(iter(state.values())).dtype)
        module.load_state_dict(tensors, strict=True)
        module.save_pretrained(folder, max_shard_size=shard_size)
    for folder in ("tokenizer", "tokenizer_2"):
        (path / folder).mkdir()
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(DEMO / name, path / folder)
    (path / "tokenizer_3").mkdir()
    shutil.copy(DEMO / "spiece.model", path / "tokenizer_3")
    return path
