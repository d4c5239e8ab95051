"""What a file is that is not supported, read off the names of its tensors."""

import re
from collections.abc import Mapping

import models
from weights.files import Entry, some

OTHER_KINDS = (  # what one tensor is enough to tell; {}: the families that are run
    (r".*(lora_|\.lora\.|\.lokr_|\.hada_|\.dora_scale|\.alpha$)", "a LoRA, which is no model of its own: merge it into"
     " one first"),
    (r"(control_model|controlnet_|input_hint_block)", "a ControlNet, which is not supported"),
    (r"(v_pred|ztsnr)$|edm_vpred\.", "a variant with v-prediction or another noise schedule, which is not supported"),
    (r"(model\.diffusion_model\.)?double_blocks\.", "a Flux model: only {} are run here"),
    (r"cond_stage_model\.|model\.diffusion_model\.input_blocks\.", "a Stable Diffusion 1 or 2 model: only {}"
     " are run here"),
    (r"(emb_params|string_to_param|clip_[lg])$", "a textual inversion embedding, not a model"),
    (r"(down_blocks|transformer_blocks)\.", "a denoiser in Hugging Face naming: give the folder that holds"
     " model_index.json instead"),
    (r"(joint_blocks|input_blocks)\.", "a denoiser without the prefix model.diffusion_model.: fetch the official file"),
    (r"(text_model|encoder\.block|transformer\.resblocks)\.", "a text encoder alone: give the model, and this file as"
     " one of the text encoders"),
)  # fmt: skip
AUTOENCODER = r"(first_stage_model|loss|model_ema|quant_conv|post_quant_conv|encoder|decoder)\."
INCOMPLETE = r"(first_stage_model|conditioner|text_encoders)\."
QUANTISED = (  # names of what is stored beside quantised weights, and how these are called
    (r".*\.quant_state\.bitsandbytes__(nf4|fp4)", "{} weights (4 bits, by bitsandbytes)"),
    (r".*\.(?:absmax|quant_map)()", "4-bit weights (by bitsandbytes)"),
    (r".*\.SCB()", "int8 weights (by bitsandbytes)"),
    (r".*\.(?:qweight|qzeros|wscales)()", "weights quantised by GPTQ, AWQ or SVDQuant"),
    (r".*\.weight_scale_2()", "nvfp4 weights with scales"),
    (r"(?:.*\.)?(?:scaled_fp8|comfy_quant|scale_weight|weight_scale|scale_input|input_scale|weight\._data|weight\._scale)()",
     "{} weights with scales"),
)  # fmt: skip


def known(between: str = " and ") -> str:
    """The families that are run, in words."""
    return between.join(family.title for family in models.FAMILIES)


def other_kind(entries: Mapping[str, Entry]) -> str:
    """What a file is that holds no family's denoiser."""
    for pattern, kind in OTHER_KINDS:
        if any(re.match(pattern, key) for key in entries):
            return kind.format(known())
    if entries and all(re.match(AUTOENCODER, key) for key in entries):
        return "an autoencoder alone, not a whole model"
    if any(re.match(INCOMPLETE, key) for key in entries):
        return "not a whole model: it has no denoiser (model.diffusion_model.); fetch the whole file"
    if words := quantised(entries):
        return f"a file of {words}"
    return f"neither an {known(' nor an ')} model; its tensors: {some(list(entries)) or 'none'}"


def quantised(entries: Mapping[str, Entry]) -> str | None:
    """How weights are stored that are quantised in a way that is not supported, and what to do; None where they are not."""
    scaled = "int8" if any(entry.dtype == "I8" for entry in entries.values()) else "fp8"
    for pattern, words in QUANTISED:
        for key in entries:
            if match := re.fullmatch(pattern, key):
                words = words.format(match[1] or scaled)
                return f"{words}, which are not supported: fetch the fp16 or plain fp8 file"
    return None
