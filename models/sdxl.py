"""SDXL: base 1.0 and its fine-tunes (Podell et al. 2023)."""

import torch
from torch import Tensor

from models import clips
from models.autoencoder import Autoencoder
from models.clip import CLIPConfig, CLIPText
from models.embeddings import sinusoid
from models.family import Configs, Family, Part, Refusal, Scheduler, channels_misfit
from models.unet import UNet, UNetConditioning

VARIANT = "an SDXL variant with v-prediction or another noise schedule, which is not supported"
REFINER = "the SDXL refiner, which reads bigG alone: only the base model is run here"


def encode(run, texts, size, configs: Configs, lengths, like: Tensor) -> list[UNetConditioning]:
    """Penultimate states of CLIP-L and bigG side by side; bigG's pooled text and six sizes as the vector.

    Zeros where there is no text. Sizes: original height and width, crop top and left, target height and width, each a
    256-wide sinusoid (Podell et al. 2023, Sec. 2.2).
    """
    denoiser, clip = configs["denoiser"], configs["clip_g"]
    given = [text for text in texts if text is not None]
    states = zip(run("clip_l", given), run("clip_g", given))
    encoded = iter([(torch.cat([small, large], dim=2), pooled) for (small, _), (large, pooled) in states])
    zeros = like.new_zeros(1, clip.positions, denoiser.context_width), like.new_zeros(1, clip.projection)
    numbers = torch.tensor([*size, 0, 0, *size], device=like.device)
    width = (denoiser.vector_width - clip.projection) // len(numbers)
    sizes = sinusoid(numbers, width).flatten()[None].to(like.dtype)  # (1, 6 * 256)
    made = [zeros if text is None else next(encoded) for text in texts]
    return [UNetConditioning(text, torch.cat([pooled, sizes], dim=1)) for text, pooled in made]


def misfit(configs: Configs) -> list[str]:
    """Sentences on parts that do not fit each other."""
    denoiser, clip_l, clip_g = (configs.get(part) for part in ("denoiser", "clip_l", "clip_g"))
    problems = []
    if denoiser.in_channels != denoiser.out_channels:
        problems.append(
            f"its U-Net takes {denoiser.in_channels} channels and gives {denoiser.out_channels}, as for inpainting"
            " or editing, which is not done here"
        )
    if clip_l and clip_g and clip_l.width + clip_g.width != denoiser.context_width:
        width = clip_l.width + clip_g.width
        problems.append(f"text encoders {width} wide do not fit a U-Net that takes {denoiser.context_width}")
    if clip_g is not None:
        sizes = denoiser.vector_width - (clip_g.projection or 0)
        if clip_g.projection is None or sizes <= 0 or sizes % 12:
            problems.append(
                f"pooled text of {clip_g.projection} and six sizes do not make up the U-Net's vector of"
                f" {denoiser.vector_width}"
            )
    problems += clips.positions_misfit(configs)
    return problems or channels_misfit(denoiser.out_channels, configs)


def spare(config: CLIPConfig) -> tuple[str, ...]:
    """What is never used of CLIP-L: its last layer, of which only the input is taken, and the pooled state."""
    return f"text_model.encoder.layers.{config.layers - 1}.", "text_model.final_layer_norm."


FAMILY = Family(
    name="sdxl",
    title="SDXL",
    mark=r"label_emb\.0\.0\.weight$",
    folder_mark=r"add_embedding\.linear_1\.weight$",
    parts={
        "denoiser": Part(
            UNet,
            "model.diffusion_model.",
            "unet",
            table="unet",
            fixed={
                "act_fn": "silu", "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0,
                "addition_embed_type": "text_time", "class_embed_type": None, "resnet_time_scale_shift": "default",
                "mid_block_scale_factor": 1, "dual_cross_attention": False,
            },
        ),
        "vae": Part(
            Autoencoder,
            "first_stage_model.",
            "vae",
            given={"scaling": 0.13025, "shift": 0.0},
            fixed={"act_fn": "silu", "latents_mean": None},  # the latter: Playground normalises by channel
        ),
        "clip_l": Part(
            CLIPText,
            "conditioner.embedders.0.transformer.",
            "text_encoder",
            given={"activation": "quick_gelu", "spare_layers": 1},
            fixed=clips.FIXED,
            tokenizer="tokenizer",
            spare=spare,
            unused=r"text_projection\.weight",
            files=("clip_l.safetensors",),
        ),
        "clip_g": Part(
            CLIPText,
            "conditioner.embedders.1.model.",
            "text_encoder_2",
            given={"activation": "gelu"},
            fixed=clips.FIXED,
            tokenizer="tokenizer_2",
            pad=0,
            files=("clip_g.safetensors",),
        ),
    },
    prediction="epsilon",
    encode=encode,
    guidance=5.0,
    size={"height": 1024, "width": 1024},
    switch={"window": 12, "slope": 4e-4, "cap": 15, "interval": 5},  # paper, appendix G
    text_encoder=clips.text_encoder,
    misfit=misfit,
    zero_negative=True,
    refusals=(
        Refusal(r"(v_pred|ztsnr)$|edm_vpred\.", VARIANT),
        Refusal(r"conditioner\.embedders\.0\.model\.", REFINER),
        Refusal(r"mid_block\.attentions\.0\.transformer_blocks\.0\.attn2\.to_k\.weight", REFINER, width=1280),
    ),
    refused_predictions=(
        (r"v", VARIANT),
        (r"sample|x0|flow|rf|rectified|edm", "an SDXL variant trained for another prediction ({}), which is not supported"),
    ),
    scheduler=Scheduler(
        usual=r"(DDIM|DDPM|PNDM|LMSDiscrete|Euler(Ancestral)?Discrete|DPMSolver(Multistep|Singlestep|SDE)|HeunDiscrete"
        r"|KDPM2(Ancestral)?Discrete|DEISMultistep|UniPCMultistep|SASolver)Scheduler",
        refused=r".*(Flow|EDM|RF|SCM|CMStochastic|Cosine).*",
        reason="an SDXL model is run only as one that predicts epsilon",
        fixed={
            "prediction_type": "epsilon", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
            "beta_schedule": "scaled_linear", "trained_betas": None, "rescale_betas_zero_snr": False,
            "use_flow_sigmas": False, "timestep_type": "discrete",
        },
        sampled={
            "timestep_spacing": "leading", "steps_offset": 1, "use_karras_sigmas": False,
            "use_exponential_sigmas": False, "use_beta_sigmas": False, "thresholding": False,
        },
    ),
    sources={
        "clip_l": f"clip_l.safetensors from {clips.ENCODER_HOME}",
        "clip_g": f"clip_g.safetensors from {clips.ENCODER_HOME}",
    },
)  # fmt: skip
