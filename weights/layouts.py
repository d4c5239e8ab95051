"""From the names in a file to the names of the modules: tables of rules, one table for each naming.

`translate` is pure: a set of file names in, for each module parameter the file names it is made from and how. The
namings are the official single-file one (identity), OpenCLIP's (bigG inside SDXL single files) and Hugging Face's.
Which one a part has is read off its names. Facts: diffusers scripts/convert_sd3_to_diffusers.py and
loaders/single_file_utils.py, Stability-AI/generative-models, mlfoundations/open_clip.
"""

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Rule = tuple[
    str, Callable[..., list[tuple[str, str]]]
]  # regex of the file name, its groups -> [(module name, how)]


@dataclass(frozen=True)
class Source:
    """What a module parameter is made from.

    `how`: "copy"; "concat" (three tensors along dim 0); "third 0|1|2" (of dim 0); "transpose"; "swap" (exchange the
    halves of dim 0); "conv" ([C, C] -> [C, C, 1, 1]).
    """

    keys: tuple[str, ...]
    how: str

    def make(self, tensors: list[Tensor]) -> Tensor:
        """The parameter from the tensors under `keys`: a view where possible."""
        if self.how == "concat":
            return torch.cat(tensors)
        (tensor,) = tensors
        if self.how.startswith("third"):
            return tensor.chunk(3)[int(self.how[-1])]
        if self.how == "swap":
            return torch.cat(tensor.chunk(2)[::-1])
        if self.how == "transpose":
            return tensor.T
        if self.how == "conv":
            return tensor.reshape(*tensor.shape[:2], 1, 1)
        return tensor

    def shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
        """Shape of the parameter from the shapes under `keys`; None where they do not allow it."""
        first, rank = shapes[0], len(shapes[0])
        if self.how == "concat":
            same = all(s[1:] == first[1:] for s in shapes) and rank > 0
            return (sum(s[0] for s in shapes), *first[1:]) if same else None
        if self.how.startswith("third"):
            return (first[0] // 3, *first[1:]) if rank and first[0] % 3 == 0 and first[0] else None
        if self.how == "swap":
            return first if rank and first[0] % 2 == 0 and first[0] else None
        if self.how == "transpose":
            return first[::-1] if rank == 2 else None
        if self.how == "conv":
            return (*first[:2], 1, 1) if rank == 2 or rank == 4 and first[2:] == (1, 1) else None
        return first


def numbers(keys: Iterable[str], pattern: str) -> int:
    """How many numbers 0, 1, 2, ... the one group of the pattern takes, without a gap, at the start of the keys."""
    found = {int(match[1]) for key in keys if (match := re.match(pattern, key))}
    return next(i for i in range(len(found) + 1) if i not in found)


def copy(name: str) -> list[tuple[str, str]]:
    """One parameter, unchanged."""
    return [(name, "copy")]


def identity(names: str) -> Rule:
    """Names that are equal on both sides."""
    return rf"((?:{names}).*)", copy


UNET_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
               "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
UNET_ENDS = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
             "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip


def unet_folder(keys: Collection[str]) -> list[Rule]:
    """Hugging Face U-Net: levels of resnets and attentions -> one list of blocks in, one out."""
    down = (
        numbers(keys, r"down_blocks\.0\.resnets\.(\d+)\.") + 1
    )  # input blocks a level, with the downsampling
    up = numbers(keys, r"up_blocks\.0\.resnets\.(\d+)\.")
    attended = {match[1] for key in keys if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", key))}

    def resnet(place: str, layer: str) -> list[tuple[str, str]]:
        name, kind = layer.split(".")
        return copy(f"{place}.{UNET_RESNET[name]}.{kind}")

    def upsampler(level: str, kind: str) -> list[tuple[str, str]]:
        return copy(f"output_blocks.{int(level) * up + up - 1}.{2 if level in attended else 1}.conv.{kind}")

    layer = rf"((?:{'|'.join(UNET_RESNET)})\.(?:weight|bias))"
    return [
        (rf"({'|'.join(map(re.escape, UNET_ENDS))})\.(\w+)", lambda end, kind: copy(f"{UNET_ENDS[end]}.{kind}")),
        (rf"down_blocks\.(\d+)\.resnets\.(\d+)\.{layer}",
         lambda level, i, rest: resnet(f"input_blocks.{int(level) * down + int(i) + 1}.0", rest)),
        (r"down_blocks\.(\d+)\.attentions\.(\d+)\.(.+)",
         lambda level, i, rest: copy(f"input_blocks.{int(level) * down + int(i) + 1}.1.{rest}")),
        (r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(\w+)",
         lambda level, kind: copy(f"input_blocks.{(int(level) + 1) * down}.0.op.{kind}")),
        (rf"mid_block\.resnets\.([01])\.{layer}", lambda i, rest: resnet(f"middle_block.{2 * int(i)}", rest)),
        (r"mid_block\.attentions\.0\.(.+)", lambda rest: copy(f"middle_block.1.{rest}")),
        (rf"up_blocks\.(\d+)\.resnets\.(\d+)\.{layer}",
         lambda level, i, rest: resnet(f"output_blocks.{int(level) * up + int(i)}.0", rest)),
        (r"up_blocks\.(\d+)\.attentions\.(\d+)\.(.+)",
         lambda level, i, rest: copy(f"output_blocks.{int(level) * up + int(i)}.1.{rest}")),
        (r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(\w+)", upsampler),
    ]  # fmt: skip


MMDIT_ENDS = {"pos_embed.proj": "x_embedder.proj", "context_embedder": "context_embedder",
              "proj_out": "final_layer.linear",
              "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
              "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
              "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
              "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2"}  # fmt: skip
MMDIT_BLOCK = {  # inside a joint block, everything but q, k, v and the modulations
    "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q", "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q", "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj", "attn2.norm_q": "x_block.attn2.ln_q", "attn2.norm_k": "x_block.attn2.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
    "norm1.linear": "x_block.adaLN_modulation.1",
}  # fmt: skip
MMDIT_QKV = {"attn.to_": "x_block.attn", "attn2.to_": "x_block.attn2", "attn.add_": "context_block.attn"}


def mmdit_folder(keys: Collection[str]) -> list[Rule]:
    """Hugging Face MMDiT: q, k, v apart; (scale, shift) instead of (shift, scale) where there is no gate."""
    last = numbers(keys, r"transformer_blocks\.(\d+)\.") - 1
    block = r"transformer_blocks\.(\d+)\."

    def context_modulation(i: str, kind: str) -> list[tuple[str, str]]:
        how = "swap" if int(i) == last else "copy"  # the last context block has no gate
        return [(f"joint_blocks.{i}.context_block.adaLN_modulation.1.{kind}", how)]

    return [
        (r"pos_embed\.pos_embed", lambda: copy("pos_embed")),
        (rf"({'|'.join(map(re.escape, MMDIT_ENDS))})\.(weight|bias)",
         lambda end, kind: copy(f"{MMDIT_ENDS[end]}.{kind}")),
        (r"norm_out\.linear\.(weight|bias)", lambda kind: [(f"final_layer.adaLN_modulation.1.{kind}", "swap")]),
        (block + r"norm1_context\.linear\.(weight|bias)", context_modulation),
        (block + rf"({'|'.join(map(re.escape, MMDIT_BLOCK))})\.(weight|bias)",
         lambda i, layer, kind: copy(f"joint_blocks.{i}.{MMDIT_BLOCK[layer]}.{kind}")),
        (block + r"(attn2?\.to_|attn\.add_)([qkv])(?:_proj)?\.(weight|bias)",
         lambda i, stream, piece, kind: [(f"joint_blocks.{i}.{MMDIT_QKV[stream]}.qkv.{kind}", piece)]),
    ]  # fmt: skip


VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
                 "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}  # fmt: skip


def vae_folder(keys: Collection[str]) -> list[Rule]:
    """Hugging Face autoencoder: the decoder's levels counted from the other end, Linear attention layers."""
    last = numbers(keys, r"decoder\.up_blocks\.(\d+)\.") - 1
    layer = r"((?:norm1|conv1|norm2|conv2|conv_shortcut)\.(?:weight|bias))"

    def resnet(place: str, rest: str) -> list[tuple[str, str]]:
        return copy(f"{place}.{rest.replace('conv_shortcut', 'nin_shortcut')}")

    def attention(half: str, name: str, kind: str) -> list[tuple[str, str]]:
        how = "conv" if kind == "weight" and name != "group_norm" else "copy"
        return [(f"{half}.mid.attn_1.{VAE_ATTENTION[name]}.{kind}", how)]

    return [
        identity(r"(?:post_)?quant_conv\.|(?:encoder|decoder)\.conv_(?:in|out)\."),
        (r"(encoder|decoder)\.conv_norm_out\.(\w+)", lambda half, kind: copy(f"{half}.norm_out.{kind}")),
        (rf"(encoder|decoder)\.mid_block\.resnets\.([01])\.{layer}",
         lambda half, i, rest: resnet(f"{half}.mid.block_{int(i) + 1}", rest)),
        (rf"(encoder|decoder)\.mid_block\.attentions\.0\.({'|'.join(map(re.escape, VAE_ATTENTION))})\.(weight|bias)",
         attention),
        (rf"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.{layer}",
         lambda level, i, rest: resnet(f"encoder.down.{level}.block.{i}", rest)),
        (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.(.+)",
         lambda level, rest: copy(f"encoder.down.{level}.downsample.{rest}")),
        (rf"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.{layer}",
         lambda level, i, rest: resnet(f"decoder.up.{last - int(level)}.block.{i}", rest)),
        (r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.(.+)",
         lambda level, rest: copy(f"decoder.up.{last - int(level)}.upsample.{rest}")),
    ]  # fmt: skip


OPENCLIP_LAYER = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
                  "attn.out_proj": "self_attn.out_proj"}  # fmt: skip


def openclip(keys: Collection[str]) -> list[Rule]:
    """OpenCLIP: q, k, v fused; the projection stored for x @ P where nn.Linear has x @ W.T.

    Files by older convert scripts of diffusers keep the projection as nn.Linear has it, as `text_projection.weight`; ComfyUI
    (comfy/utils.py, clip_text_transformers_convert) tells the two apart by the name too.
    """
    layer = r"transformer\.resblocks\.(\d+)\."

    def fused(i: str, kind: str) -> list[tuple[str, str]]:
        names = (f"text_model.encoder.layers.{i}.self_attn.{letter}_proj.{kind}" for letter in "qkv")
        return [(name, f"third {third}") for third, name in enumerate(names)]

    return [
        (r"token_embedding\.weight", lambda: copy("text_model.embeddings.token_embedding.weight")),
        (r"positional_embedding", lambda: copy("text_model.embeddings.position_embedding.weight")),
        (r"ln_final\.(\w+)", lambda kind: copy(f"text_model.final_layer_norm.{kind}")),
        (r"text_projection", lambda: [("text_projection.weight", "transpose")]),
        identity(r"text_projection\.weight"),
        (layer + r"attn\.in_proj_(weight|bias)", fused),
        (layer + rf"({'|'.join(map(re.escape, OPENCLIP_LAYER))})\.(weight|bias)",
         lambda i, name, kind: copy(f"text_model.encoder.layers.{i}.{OPENCLIP_LAYER[name]}.{kind}")),
    ]  # fmt: skip


def clip(keys: Collection[str]) -> list[Rule]:
    """transformers' naming, which is the official one too; transformers 5 shows it without `text_model.`."""
    return [
        (
            r"(?:text_model\.)?((?:embeddings|encoder|final_layer_norm)\..*)",
            lambda rest: copy(f"text_model.{rest}"),
        ),
        identity(r"text_projection\.weight"),
    ]


def t5(keys: Collection[str]) -> list[Rule]:
    """transformers' naming; the embedding table is stored under one or both of two names."""
    table = "shared.weight" if "shared.weight" in keys else "encoder.embed_tokens.weight"
    return [
        (re.escape(table), lambda: copy("shared.weight")),
        (r"encoder\.embed_tokens\.weight", lambda: []),  # the second copy
        identity(r"encoder\."),
    ]


def official(keys: Collection[str]) -> list[Rule]:
    """The official single-file naming: nothing to do."""
    return [identity("")]


NAMINGS = {  # kind of network -> (what a naming's keys begin with, its rules)
    "unet": (("input_blocks.", official), ("down_blocks.", unet_folder)),
    "mmdit": (("joint_blocks.", official), ("transformer_blocks.", mmdit_folder)),
    "vae": (("decoder.up.", official), ("decoder.up_blocks.", vae_folder)),
    "clip": (("transformer.resblocks.", openclip), ("", clip)),
    "t5": (("", t5),),
}


SURPLUS = {  # kind of network -> tensors that some files hold and nobody needs
    # training's temperature, a constant, 0..76, which ComfyUI and older versions of transformers save, and the tower for images
    "clip": r"logit_scale|logit_bias|attn_mask|(?:transformer\.)?(?:text_model\.)?embeddings\.position_ids"
    r"|(?:vision_model|visual_projection|visual)\..*",
    "t5": r"logit_scale|(?:decoder|lm_head)\..*",  # the half that writes
    "vae": r"(?:loss|model_ema)\..*",  # of its training
}


def surplus(kind: str, key: str) -> bool:
    """Whether a tensor of such a network (its name without the prefix of the part) is known to be of no use."""
    return kind in SURPLUS and re.fullmatch(SURPLUS[kind], key) is not None


def translate(kind: str, keys: Collection[str]) -> tuple[dict[str, Source], list[str]]:
    """Module name -> Source for every name that the keys (prefix of the part stripped) give, and the unexpected keys.

    `kind`: "unet", "mmdit", "vae", "clip" or "t5". Keys that are known to be of no use are in neither.
    """
    keys = sorted(key for key in keys if not surplus(kind, key))
    rules = next(
        (make(set(keys)) for start, make in NAMINGS[kind] if any(k.startswith(start) for k in keys)), []
    )
    rules = [(re.compile(pattern), targets) for pattern, targets in rules]
    found: dict[str, dict[str, str]] = {}  # module name -> {how: key}
    unexpected = []
    for key in keys:
        match, targets = next(((m, t) for pattern, t in rules if (m := pattern.fullmatch(key))), (None, None))
        if match is None:
            unexpected.append(key)
            continue
        for name, how in targets(*match.groups()):
            pieces = found.setdefault(name, {})
            if how in pieces or pieces and not {how, *pieces} <= set("qkv"):
                unexpected.append(key)  # a second key for the same thing
            else:
                pieces[how] = key
    sources = {}
    for name, pieces in found.items():
        if pieces.keys() == set("qkv"):
            sources[name] = Source(tuple(pieces[letter] for letter in "qkv"), "concat")
        elif len(pieces) == 1 and not pieces.keys() & set("qkv"):
            ((how, key),) = pieces.items()
            sources[name] = Source((key,), how)
    return sources, unexpected
