"""Finds the parts of a checkpoint (denoiser, autoencoder, text encoders) by the names of its tensors.

File and folder names decide nothing, but for the sub-folders of the Hugging Face layout.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from weights.files import Entry, WeightsError, parse, read_header, read_json, some
from weights.kinds import V_PREDICTION, VARIANT, other_kind, quantised
from weights.layouts import surplus
from weights.sets import folder_entries
from weights.sniff import given_by_json

PREFIXES = {  # family -> part -> prefix of its names in a single file
    "sdxl": {
        "denoiser": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "clip_l": "conditioner.embedders.0.transformer.",
        "clip_g": "conditioner.embedders.1.model.",
    },
    "sd3": {
        "denoiser": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "clip_l": "text_encoders.clip_l.transformer.",
        "clip_g": "text_encoders.clip_g.transformer.",
        "t5": "text_encoders.t5xxl.transformer.",
    },
}
FOLDERS = {  # family -> part -> its sub-folder
    "sdxl": {"denoiser": "unet", "vae": "vae", "clip_l": "text_encoder", "clip_g": "text_encoder_2"},
    "sd3": {"denoiser": "transformer", "vae": "vae", "clip_l": "text_encoder", "clip_g": "text_encoder_2",
            "t5": "text_encoder_3"},
}  # fmt: skip
FIXED = {  # fields of a part's config.json that no tensor tells, and their only values here
    "unet": {"act_fn": "silu", "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0, "addition_embed_type": "text_time",
             "class_embed_type": None, "resnet_time_scale_shift": "default", "mid_block_scale_factor": 1, "dual_cross_attention": False},
    "mmdit": {},
    "vae": {"act_fn": "silu", "latents_mean": None},  # the latter: Playground normalises channel by channel
    "clip": {"layer_norm_eps": 1e-5},
    "t5": {"layer_norm_epsilon": 1e-6, "feed_forward_proj": "gated-gelu"},
}  # fmt: skip
OTHER_FLOWS = (  # fields of a flow scheduler_config.json that, set, make another schedule of it
    "use_dynamic_shifting", "shift_terminal", "invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas",
    "use_beta_sigmas", "stochastic_sampling",
)  # fmt: skip
TRAINED = {  # fields of SDXL's scheduler_config.json that belong to how it was trained, and their only values here
    "prediction_type": "epsilon", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "trained_betas": None, "rescale_betas_zero_snr": False, "use_flow_sigmas": False,
    "timestep_type": "discrete",
}  # fmt: skip
SAMPLED = {  # fields that belong to the sampler, and what the samplers here do
    "timestep_spacing": "leading", "steps_offset": 1, "use_karras_sigmas": False, "use_exponential_sigmas": False,
    "use_beta_sigmas": False, "thresholding": False,
}  # fmt: skip
SCHEDULERS = {  # family -> classes of diffusers that need no word; classes that are refused; what is done here
    "sdxl": (r"(DDIM|DDPM|PNDM|LMSDiscrete|Euler(Ancestral)?Discrete|DPMSolver(Multistep|Singlestep|SDE)|HeunDiscrete"
             r"|KDPM2(Ancestral)?Discrete|DEISMultistep|UniPCMultistep|SASolver)Scheduler",
             r".*(Flow|EDM|RF|SCM|CMStochastic|Cosine).*", "an SDXL model is run only as one that predicts epsilon"),
    "sd3": (r"FlowMatchEulerDiscreteScheduler", r"(?!.*Flow).*", "an SD3 model is run only with flow matching, as by"
            " FlowMatchEulerDiscreteScheduler"),
}  # fmt: skip
PREDICTIONS = {
    "sdxl": r"v|sample|x0|flow|rf|rectified|edm"
}  # family -> beginnings of modelspec.prediction_type that are refused
OFFICIAL_FILES = {  # of text encoders, in the order in which they are taken
    "clip_l": ("clip_l.safetensors",), "clip_g": ("clip_g.safetensors",),
    "t5": ("t5xxl_fp16.safetensors", "t5xxl.safetensors", "t5xxl_fp8_e4m3fn.safetensors"),
}  # fmt: skip
IGNORED = re.compile(  # tensors outside the parts that some files hold and nobody needs
    r"model_ema\..*|denoiser\.sigmas|model\.model_sampling\.sigmas|(text_encoders\.\w+|conditioner\.embedders\.0)\.logit_scale"
    r"|(sqrt_|sqrt_one_minus_|log_one_minus_|sqrt_recip_|sqrt_recipm1_)?alphas_cumprod(_prev)?|betas"
    r"|posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)"
)


@dataclass(frozen=True)
class Part:
    """One part as its file has it: names without the prefix, and what is given about it beyond the shapes."""

    kind: str  # "unet", "mmdit", "vae", "clip" or "t5"
    place: Path  # the file or sub-folder, for messages
    entries: dict[str, Entry]
    given: Mapping


@dataclass(frozen=True)
class Contents:
    """All that a file or folder holds."""

    family: str  # "sdxl" or "sd3"
    layout: str  # "single" or "folder"
    path: Path
    parts: dict[str, Part]
    defaults: dict  # prompt, height, width, guidance, shift, as far as they are given
    t5_length: int | None = None
    zero_negative: bool = True  # SDXL: whether no negative prompt means zeros (else the empty text)
    remarks: Sequence[str] = ()  # what the user should know, a sentence each
    notes: Mapping[str, list[str]] = field(default_factory=dict)  # part -> why what is there cannot be used
    unusable: str | None = None  # why the T5 inside a single file cannot be used


def kind_of(part: str, family: str) -> str:
    """The kind of network that a part is."""
    denoiser = {"sdxl": "unet", "sd3": "mmdit"}[family]
    return {"denoiser": denoiser, "vae": "vae", "clip_l": "clip", "clip_g": "clip", "t5": "t5"}[part]


def read_single(path: Path, without: Collection[str] = ()) -> Contents:
    """Contents of a single file in the official layout, but for the parts `without`. A quantised T5 is left out, with the reason."""
    entries, metadata = read_header(path)
    config = own_config(path, metadata)
    stem = "model.diffusion_model."
    if any(re.match(V_PREDICTION, key) for key in entries):
        raise WeightsError(f"{path} is {VARIANT}, which is not run here.")
    if any(key.startswith(stem + "joint_blocks.") for key in entries):
        family = "sd3"
    elif stem + "label_emb.0.0.weight" in entries and not any(
        key.startswith("conditioner.embedders.0.model.") for key in entries
    ):
        family = "sdxl"
    else:
        raise WeightsError(f"{path} is {other_kind(entries)}.")
    check_prediction(path, family, metadata)
    prefixes = PREFIXES[family]
    found: dict[str, dict[str, Entry]] = {}
    outside = {}
    for key, entry in entries.items():
        part = next((part for part, prefix in prefixes.items() if key.startswith(prefix)), None)
        if part is not None:
            found.setdefault(part, {})[key.removeprefix(prefixes[part])] = entry
        elif not IGNORED.fullmatch(key):
            outside[key] = entry
    refuse_quantised(path, outside)
    if outside:
        raise WeightsError(
            f"{path} holds {len(outside)} tensors that do not belong to {family.upper()}: {some(list(outside))}."
        )
    parts, unusable = {}, None
    for part in prefixes:
        if part in found and part not in without:
            kind = kind_of(part, family)
            given = table(path, config, kind if part == "denoiser" else part)
            try:
                refuse_quantised(f"{path}: its {part}", found[part])
                parts[part] = Part(kind, path, without_projection(part, found[part]), given)
            except WeightsError as error:
                if part != "t5":
                    raise
                unusable = str(error).rstrip(".")
    defaults = checked_defaults(path, table(path, config, "defaults"))
    length = t5_length(path, config)
    return Contents(family, "single", path, parts, defaults, length, unusable=unusable)


def check_prediction(path: Path, family: str, metadata: Mapping[str, str]) -> None:
    """WeightsError where the metadata names a prediction that is not the family's (modelspec, as kohya-ss/sd-scripts writes it)."""
    told = metadata.get("modelspec.prediction_type", "")
    if family in PREDICTIONS and re.match(PREDICTIONS[family], told.strip().lower()):
        kind = VARIANT if told.strip().lower().startswith("v") else f"trained for {ascii(told):.50}"
        raise WeightsError(f"{path} is {kind} (modelspec.prediction_type), which is not run here.")


def refuse_quantised(place: Path | str, entries: Mapping[str, Entry]) -> None:
    """WeightsError where weights are quantised in a way that is not run here."""
    if words := quantised(entries):
        raise WeightsError(f"{place} holds {words}.")


def without_projection(part: str, entries: dict[str, Entry]) -> dict[str, Entry]:
    """The tensors of a part of a single file that are used: CLIP-L's without the projection of the pooled state.

    Some files have one. Stability's code does not apply it (Stability-AI/sd3-ref, class ClipL: return_projected_pooled=False),
    and diffusers puts the identity in its place; only a Hugging Face folder's is meant to be used.
    """
    return {
        key: entry for key, entry in entries.items() if (part, key) != ("clip_l", "text_projection.weight")
    }


def own_config(path: Path, metadata: Mapping[str, str]) -> dict:
    """The metadata entry `hybridiff.config`, a JSON object; {} where there is none."""
    return parse(f"{path}, metadata entry hybridiff.config", metadata.get("hybridiff.config", "{}"))


def table(path: Path, config: Mapping, name: str) -> dict:
    """One sub-table of the metadata's configuration; {} where there is none."""
    value = config.get(name, {})
    if not isinstance(value, dict):
        raise WeightsError(f"{path}, metadata entry hybridiff.config: {name} is not a table.")
    return value


def checked_defaults(path: Path, defaults: dict) -> dict:
    """The proposed settings; WeightsError where one is not of its type."""
    for name, value in defaults.items():
        types = {"prompt": str, "height": int, "width": int}.get(name, (int, float))
        fits = isinstance(value, types) and not isinstance(value, bool)
        if not fits or not isinstance(value, str) and not 0 < value < 1e6:
            raise WeightsError(f"{path} proposes {name:.50} = {value!r:.50}, which is no such value.")
    return defaults


def t5_length(path: Path, config: Mapping) -> int | None:
    """T5's number of tokens, where the metadata gives one."""
    length = config.get("t5_length")
    if length is not None and (
        not isinstance(length, int) or isinstance(length, bool) or not 1 < length <= 4096
    ):
        raise WeightsError(f"{path}, metadata entry hybridiff.config: t5_length is {length!r:.50}.")
    return length


def read_folder(path: Path, without: Collection[str] = ()) -> Contents:
    """Contents of a folder in Hugging Face layout, but for the parts `without`. A T5 that cannot be used is left out, with a note why."""
    family = next(
        (family for family, folders in FOLDERS.items() if (path / folders["denoiser"]).is_dir()), None
    )
    if family is None:
        raise WeightsError(
            f"{path} has neither unet/ nor transformer/ in it: give the folder of an SDXL or SD3 model"
            " in Hugging Face layout, or a .safetensors file."
        )
    parts, notes, remarks = {}, {}, []
    for part, name in FOLDERS[family].items():
        folder, kind = path / name, kind_of(part, family)
        if part not in without and folder.is_dir() and (part == "denoiser" or any(folder.iterdir())):
            try:
                config = read_json(folder / "config.json")
                require(folder / "config.json", config, FIXED[kind])
                entries, remark = folder_entries(folder, kind)
                refuse_quantised(folder, entries)
                parts[part] = Part(kind, folder, entries, given_by_json(kind, config))
                remarks += remark
            except WeightsError as error:
                if part != "t5":
                    raise
                notes[part] = [str(error).rstrip(".")]
    check_denoiser(parts["denoiser"], family)
    scheduler, model_index = (
        read_json(path / "scheduler" / "scheduler_config.json"),
        read_json(path / "model_index.json"),
    )
    remarks += check_scheduler(path, family, scheduler, model_index)
    if family == "sdxl":
        require(path / "scheduler", scheduler, TRAINED)
        others = [
            f"{name} = {ascii(scheduler[name]):.50}"
            for name, value in SAMPLED.items()
            if scheduler.get(name, value) != value
        ]
        if others:
            remarks.append(
                f"The folder's scheduler asks for {', '.join(others)}; the samplers here space the steps as SDXL's own does."
            )
    if family == "sd3" and (other := [name for name in OTHER_FLOWS if scheduler.get(name)]):
        raise WeightsError(
            f"{path / 'scheduler'} asks for {', '.join(other)}, which is not done here: SD3's own schedule"
            " has a fixed shift and none of these."
        )
    defaults = {"shift": scheduler["shift"]} if family == "sd3" and "shift" in scheduler else {}
    zeros = model_index.get("force_zeros_for_empty_prompt", True)
    if not isinstance(zeros, bool):
        raise WeightsError(
            f"{path / 'model_index.json'} says force_zeros_for_empty_prompt = {ascii(zeros):.50}: it must be true or false."
        )
    defaults = checked_defaults(path, defaults)
    return Contents(
        family, "folder", path, parts, defaults, zero_negative=zeros, remarks=remarks, notes=notes
    )


def check_scheduler(path: Path, family: str, scheduler: Mapping, model_index: Mapping) -> list[str]:
    """Remarks on the class of the folder's scheduler; WeightsError where it belongs to another kind of model."""
    usual, refused, done = SCHEDULERS[family]
    listed = model_index.get("scheduler")  # ["diffusers", the class], which diffusers goes by
    named = {path / "scheduler": scheduler.get("_class_name")}
    if isinstance(listed, list) and len(listed) == 2:
        named[path / "model_index.json"] = listed[1]
    remarks = []
    for place, name in named.items():
        if name is None or re.fullmatch(usual, str(name)):
            continue
        if re.fullmatch(refused, str(name), re.DOTALL):
            raise WeightsError(f"{place} names the scheduler {ascii(name):.80}: {done}.")
        remarks = [
            f"The folder's scheduler is {ascii(name):.80}, which is not among the samplers here: {done}, and the picture may"
            " want other steps and guidance."
        ]
    return remarks


def check_denoiser(part: Part, family: str) -> None:
    """WeightsError unless the denoiser of a folder is SDXL's base U-Net or SD3's MMDiT."""
    marks = {"sdxl": "add_embedding.linear_1.weight", "sd3": "pos_embed.pos_embed"}
    context = part.entries.get("mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight")
    if marks[family] not in part.entries:
        kind = f"neither SDXL's U-Net nor SD3's MMDiT; its tensors: {some(list(part.entries)) or 'none'}"
        if "down_blocks.0.resnets.0.conv1.weight" in part.entries and "conv_in.weight" in part.entries:
            kind = "the U-Net of a Stable Diffusion 1 or 2 model: only SDXL and SD3 are run here"
        raise WeightsError(f"{part.place} is {kind}.")
    if context is not None and context.shape[1:] == (1280,):  # it reads bigG alone
        raise WeightsError(f"{part.place} is the SDXL refiner: only the base model is run here.")


def require(place: Path, config: Mapping, fixed: Mapping) -> None:
    """WeightsError where a configuration gives a field another value than the only one that is done here."""
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise WeightsError(f"{place} says {name} = {ascii(config[name]):.50}; only {value} is done here.")


def read_encoder(path: Path) -> tuple[str, Part]:
    """Name and part of a file that holds one text encoder and nothing else: "clip_l", "clip_g" or "t5"."""
    entries, metadata = read_header(path)
    config = own_config(path, metadata)
    refuse_quantised(path, entries)
    words = "embeddings.token_embedding.weight"
    embedding = entries.get(f"text_model.{words}", entries.get(words))
    if any(key.startswith("encoder.block.") for key in entries):
        part = "t5"
    elif any(key.startswith("transformer.resblocks.") for key in entries):
        part = "clip_g"
    elif embedding is not None:
        width = embedding.shape[-1] if embedding.shape else 0
        projected = "text_projection.weight" in entries
        part = {768: "clip_l", 1280: "clip_g"}.get(width, "clip_g" if projected else "clip_l")
    else:
        raise WeightsError(
            f"{path} is not a text encoder (CLIP-L, bigG or T5); its tensors: {some(list(entries))}."
        )
    return part, Part(
        kind_of(part, "sd3"), path, without_projection(part, entries), table(path, config, part)
    )


def read_beside(path: Path, wanted: list[str]) -> tuple[dict[str, list[Part]], dict[str, list[str]]]:
    """Text encoder files beside an SD3 file (or in text_encoders/ there), for each part those with an official name first, then
    the largest (of the finest dtype), and why others of them cannot be used.
    """
    found: dict[str, list[Part]] = {part: [] for part in wanted}
    notes: dict[str, list[str]] = {}
    files = [
        file
        for folder in ("", "text_encoders")
        for file in sorted((path.parent / folder).glob("*.safetensors"))
    ]
    for file in files if wanted else ():
        try:
            part, encoder = read_encoder(file)
        except WeightsError as error:
            guess = next((part for part in wanted if part in file.name), None)
            if guess is not None:
                notes.setdefault(guess, []).append(str(error).rstrip("."))
            continue
        if part in wanted:
            found[part].append(encoder)

    def rank(part: str, encoder: Part) -> tuple[int, int]:
        names = OFFICIAL_FILES[part]
        name = encoder.place.name
        return names.index(name) if name in names else len(names), -total_size(encoder)

    return {
        part: sorted(those, key=lambda encoder: rank(part, encoder)) for part, those in found.items()
    }, notes


def total_size(part: Part) -> int:
    """Bytes of all tensors of a part that are of use."""
    return sum(entry.size for key, entry in part.entries.items() if not surplus(part.kind, key))
