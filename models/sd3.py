"""SD3 and SD3.5 (Esser et al. 2024, arXiv 2403.03206)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from models import clips
from models.autoencoder import Autoencoder
from models.clip import CLIPText
from models.family import Configs, Family, Part, Scheduler, channels_misfit
from models.mmdit import MMDiT, MMDiTConditioning
from models.t5 import T5Encoder


def encode(run, texts, size, configs: Configs, lengths, like: Tensor) -> list[MMDiTConditioning]:
    """CLIP rows (CLIP-L and bigG side by side, padded with zeros to T5's width), then T5's rows; pooled of both CLIPs.

    Without T5 its rows are zeros (Esser et al. 2024, Sec. 5.3.3).
    """
    width = configs["denoiser"].context_width
    clip_l, clip_g = run("clip_l", texts), run("clip_g", texts)
    t5 = run("t5", texts) if "t5" in configs else [like.new_zeros(1, lengths["t5"], width)] * len(texts)
    branches = []
    for (text_l, pooled_l), (text_g, pooled_g), rows in zip(clip_l, clip_g, t5):
        clip = torch.cat([text_l, text_g], dim=2)
        clip = F.pad(clip, (0, width - clip.shape[2]))
        text = torch.cat([clip, rows.to(like.dtype)], dim=1)  # (1, 77 + 256, 4096) in SD3-medium
        branches.append(MMDiTConditioning(text, torch.cat([pooled_l, pooled_g], dim=1)))
    return branches


def misfit(configs: Configs) -> list[str]:
    """Sentences on parts that do not fit each other."""
    denoiser, clip_l, clip_g, t5 = (configs.get(part) for part in ("denoiser", "clip_l", "clip_g", "t5"))
    problems = []
    if clip_g is not None and clip_g.projection is None:
        problems.append("its clip_g has no text_projection")
    elif clip_l and clip_g:
        pooled = clips.pooled_width(clip_l), clips.pooled_width(clip_g)
        if sum(pooled) != denoiser.pooled_width:
            problems.append(
                f"CLIP encoders with pooled states of {pooled[0]} and {pooled[1]} do"
                f" not fit an MMDiT that takes {denoiser.pooled_width}"
            )
    if t5 is not None and t5.width != denoiser.context_width:
        problems.append(f"T5 {t5.width} wide does not fit an MMDiT that takes {denoiser.context_width}")
    problems += clips.positions_misfit(configs)
    return problems or channels_misfit(denoiser.latent_channels, configs)


FAMILY = Family(
    name="sd3",
    title="SD3",
    mark=r"joint_blocks\.",
    folder_mark=r"pos_embed\.pos_embed$",
    parts={
        "denoiser": Part(MMDiT, "model.diffusion_model.", "transformer", table="mmdit"),
        "vae": Part(
            Autoencoder,
            "first_stage_model.",
            "vae",
            given={"scaling": 1.5305, "shift": 0.0609},
            fixed={"act_fn": "silu", "latents_mean": None},
        ),
        "clip_l": Part(
            CLIPText,
            "text_encoders.clip_l.transformer.",
            "text_encoder",
            given={"activation": "quick_gelu"},
            fixed=clips.FIXED,
            tokenizer="tokenizer",
            # Stability's code does not apply it (sd3-ref, class ClipL: return_projected_pooled=False), and diffusers puts the
            # identity in its place; only a Hugging Face folder's is meant to be used
            unused=r"text_projection\.weight",
            files=("clip_l.safetensors",),
        ),
        "clip_g": Part(
            CLIPText,
            "text_encoders.clip_g.transformer.",
            "text_encoder_2",
            given={"activation": "gelu"},
            fixed=clips.FIXED,
            tokenizer="tokenizer_2",
            pad=0,
            files=("clip_g.safetensors",),
        ),
        "t5": Part(
            T5Encoder,
            "text_encoders.t5xxl.transformer.",
            "text_encoder_3",
            fixed={"layer_norm_epsilon": 1e-6, "feed_forward_proj": "gated-gelu"},
            optional=True,
            tokenizer="tokenizer_3",
            files=("t5xxl_fp16.safetensors", "t5xxl.safetensors", "t5xxl_fp8_e4m3fn.safetensors"),
        ),
    },
    prediction="flow",
    encode=encode,
    guidance=7.0,
    size={"height": 1024, "width": 1024},
    switch={"window": 15, "slope": 1e-4, "cap": 40, "interval": 5},  # paper, appendix G
    text_encoder=clips.text_encoder,
    misfit=misfit,
    beside=True,
    scheduler=Scheduler(
        usual=r"FlowMatchEulerDiscreteScheduler",
        refused=r"(?!.*Flow).*",
        reason="an SD3 model is run only with flow matching, as by FlowMatchEulerDiscreteScheduler",
        unset=(
            "use_dynamic_shifting", "shift_terminal", "invert_sigmas", "use_karras_sigmas",
            "use_exponential_sigmas", "use_beta_sigmas", "stochastic_sampling",
        ),
        defaults=("shift",),
    ),
    sources={
        "clip_l": f"clip_l.safetensors from {clips.ENCODER_HOME}",
        "clip_g": f"clip_g.safetensors from {clips.ENCODER_HOME}",
        "t5": f"t5xxl_fp16.safetensors or t5xxl_fp8_e4m3fn.safetensors from {clips.ENCODER_HOME}",
    },
)  # fmt: skip
