"""Finds the parts of a checkpoint (denoiser, autoencoder, text encoders) by the names of its tensors.

File and folder names decide nothing, but for the sub-folders of the Hugging Face layout.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from weights.files import Entry, WeightsError, read_header
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
    "beta_schedule": "scaled_linear", "trained_betas": None, "rescale_betas_zero_snr": False,
}  # fmt: skip
SAMPLED = {  # fields that belong to the sampler, and what the samplers here do
    "timestep_spacing": "leading", "steps_offset": 1, "use_karras_sigmas": False, "use_exponential_sigmas": False,
    "use_beta_sigmas": False, "thresholding": False,
}  # fmt: skip
IGNORED = re.compile(  # tensors outside the parts that some files hold and nobody needs
    r"model_ema\..*|denoiser\.sigmas|model\.model_sampling\.sigmas|(text_encoders\.\w+|conditioner\.embedders\.0)\.logit_scale"
    r"|(sqrt_|sqrt_one_minus_|log_one_minus_|sqrt_recip_|sqrt_recipm1_)?alphas_cumprod(_prev)?|betas"
    r"|posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)"
)
V_PREDICTION = r"(v_pred|ztsnr)$|edm_vpred\."
VARIANT = "an SDXL variant with v-prediction or another noise schedule"
OTHER_KINDS = (  # what else is found under the name .safetensors
    (r".*(lora_|\.lora\.|\.lokr_|\.hada_|\.dora_scale|\.alpha$)", "a LoRA, which is no model of its own: merge it into"
     " one first"),
    (r"(control_model|controlnet_|input_hint_block)", "a ControlNet, which is not run here"),
    (V_PREDICTION, f"{VARIANT}, which is not run here"),
    (r"(.*\.)?scaled_fp8$", "a file of fp8 weights with scales, which is not run here: fetch the fp16 or plain fp8 file"),
    (r"(model\.diffusion_model\.)?double_blocks\.", "a Flux model: only SDXL and SD3 are run here"),
    (r"conditioner\.embedders\.0\.model\.", "the SDXL refiner: only the base model is run here"),
    (r"cond_stage_model\.|model\.diffusion_model\.input_blocks\.", "a Stable Diffusion 1 or 2 model: only SDXL and SD3"
     " are run here"),
    (r"(emb_params|string_to_param|clip_[lg])$", "a textual inversion embedding, not a model"),
    (r"(down_blocks|transformer_blocks)\.", "a denoiser in Hugging Face naming: give the folder that holds"
     " model_index.json instead"),
    (r"(first_stage_model\.|encoder\.down|decoder\.)", "an autoencoder alone, not a whole model"),
    (r"(text_model|encoder\.block|transformer\.resblocks)\.", "a text encoder alone: give the model, and this file as"
     " one of the text encoders"),
    (r"(joint_blocks|input_blocks)\.", "a denoiser without the prefix model.diffusion_model.: fetch the official file"),
)  # fmt: skip


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


def kind_of(part: str, family: str) -> str:
    """The kind of network that a part is."""
    denoiser = {"sdxl": "unet", "sd3": "mmdit"}[family]
    return {"denoiser": denoiser, "vae": "vae", "clip_l": "clip", "clip_g": "clip", "t5": "t5"}[part]


def some(names: list[str], count: int = 4) -> str:
    """The first few of a list of names, made printable."""
    shown = (name if name.isascii() and name.isprintable() else ascii(name) for name in names[:count])
    return ", ".join(f"{name:.120}" for name in shown) + (", ..." if len(names) > count else "")


def read_single(path: Path) -> Contents:
    """Contents of a single file in the official layout."""
    entries, metadata = read_header(path)
    config = own_config(path, metadata)
    stem = "model.diffusion_model."
    if marks := [key for key in entries if re.match(V_PREDICTION, key) or key.endswith("scaled_fp8")]:
        raise WeightsError(f"{path} is {other_kind(marks)}.")
    if metadata.get("modelspec.prediction_type", "")[:1] == "v":  # as kohya-ss/sd-scripts writes it
        raise WeightsError(f"{path} is {VARIANT}, which is not run here.")
    if any(key.startswith(stem + "joint_blocks.") for key in entries):
        family = "sd3"
    elif stem + "label_emb.0.0.weight" in entries and not any(
        key.startswith("conditioner.embedders.0.model.") for key in entries
    ):
        family = "sdxl"
    else:
        raise WeightsError(f"{path} is {other_kind(list(entries))}.")
    prefixes = PREFIXES[family]
    found: dict[str, dict[str, Entry]] = {}
    unexpected = []
    for key, entry in entries.items():
        part = next((part for part, prefix in prefixes.items() if key.startswith(prefix)), None)
        if part is not None:
            found.setdefault(part, {})[key.removeprefix(prefixes[part])] = entry
        elif not IGNORED.fullmatch(key):
            unexpected.append(key)
    if unexpected:
        raise WeightsError(
            f"{path} holds {len(unexpected)} tensors that do not belong to {family.upper()}:"
            f" {some(unexpected)}."
        )
    parts = {}
    for part in prefixes:
        if part in found:
            kind = kind_of(part, family)
            given = table(path, config, kind if part == "denoiser" else part)
            parts[part] = Part(kind, path, without_projection(part, found[part]), given)
    defaults = checked_defaults(path, table(path, config, "defaults"))
    return Contents(family, "single", path, parts, defaults, t5_length(path, config))


def without_projection(part: str, entries: dict[str, Entry]) -> dict[str, Entry]:
    """The tensors of a part of a single file that are used: CLIP-L's without the projection of the pooled state.

    Some files have one. Stability's code does not apply it (Stability-AI/sd3-ref, class ClipL: return_projected_pooled=False),
    and diffusers puts the identity in its place; only a Hugging Face folder's is meant to be used.
    """
    return {
        key: entry for key, entry in entries.items() if (part, key) != ("clip_l", "text_projection.weight")
    }


def other_kind(keys: list[str]) -> str:
    """What a file that holds neither SDXL nor SD3 is."""
    for pattern, kind in OTHER_KINDS:
        if any(re.match(pattern, key) for key in keys):
            return kind
    return f"neither an SDXL nor an SD3 model; its tensors: {some(keys) or 'none'}"


def own_config(path: Path, metadata: Mapping[str, str]) -> dict:
    """The metadata entry `hybridiff.config`, a JSON object; {} where there is none."""
    return parse(f"{path}, metadata entry hybridiff.config", metadata.get("hybridiff.config", "{}"))


def parse(where: str, text: str) -> dict:
    """A JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{where} is not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{where} is not a JSON object.")
    return value


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
                entries, remark = folder_entries(folder)
                parts[part] = Part(kind, folder, entries, given_by_json(kind, config))
                remarks += remark
            except WeightsError as error:
                if part != "t5":
                    raise
                notes[part] = [str(error).rstrip(".")]
    check_denoiser(parts["denoiser"], family)
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
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
    index = path / "model_index.json"
    zeros = read_json(index).get("force_zeros_for_empty_prompt", True)
    if not isinstance(zeros, bool):
        raise WeightsError(
            f"{index} says force_zeros_for_empty_prompt = {ascii(zeros):.50}: it must be true or false."
        )
    defaults = checked_defaults(path, defaults)
    return Contents(
        family, "folder", path, parts, defaults, zero_negative=zeros, remarks=remarks, notes=notes
    )


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


def read_json(path: Path) -> dict:
    """A JSON object from a small file; {} where there is no such file."""
    try:
        if not path.is_file():
            return {}
        if path.stat().st_size > 10_000_000:
            raise WeightsError(f"{path} is too long for a configuration.")
        return parse(str(path), path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} cannot be read: {error}.") from None


SHARD = re.compile(
    r"(?P<stem>[^.]+?)(?P<old>-\d{5}-of-\d{5})?(?:\.(?P<variant>[^.]+?))?(?P<new>-\d{5}-of-\d{5})?\.safetensors"
)
STEMS = ("diffusion_pytorch_model", "model")  # as diffusers and transformers name them


def folder_entries(folder: Path) -> tuple[dict[str, Entry], list[str]]:
    """The tensors of a sub-folder: of its plain file(s), else of the fp16 or bf16 variant; shards are put together. A variant with a file
    that cannot be used, such as a pointer of Git LFS, makes way for the next, with a remark.

    Shards are numbered after the variant (`model.fp16-00001-of-00002`) or, by older versions of diffusers, before it.
    """
    sets: dict[
        tuple[str, str, int], dict[str, Path]
    ] = {}  # (stem, variant, number of shards) -> number -> file
    for file in sorted(folder.glob("*.safetensors")):
        if match := SHARD.fullmatch(file.name):
            number, of = (match["old"] or match["new"] or "-00001-of-00001").removeprefix("-").split("-of-")
            sets.setdefault((match["stem"], match["variant"] or "", int(of)), {})[number] = file
    if not sets:
        pickles = any(folder.glob("*.bin")) or any(folder.glob("*.ckpt"))
        raise WeightsError(
            f"{folder} holds no .safetensors file"
            + (", only pickles, which are never opened here." if pickles else ".")
        )
    order = {"": 0, "fp16": 1, "bf16": 2}
    ranked = sorted(
        sets, key=lambda s: (s[0] not in STEMS, len(sets[s]) != s[2], order.get(s[1], 3), s)
    )  # whole sets first
    shards, files = ranked[0][2], sets[ranked[0]]
    if len(files) != shards:
        raise WeightsError(f"{folder} holds {len(files)} of {shards} shards: fetch the others.")
    problems = []
    for key in ranked:
        if len(sets[key]) == key[2] and key[0] == ranked[0][0]:
            try:
                entries = together(sets[key].values())
            except WeightsError as problem:
                problems.append(problem)
            else:
                return entries, [
                    f"{str(problem).rstrip('.')}; the variant {key[1] or 'without a name'} beside it is taken."
                    for problem in problems[:1]
                ]
    raise problems[0]


def together(files: Iterable[Path]) -> dict[str, Entry]:
    """The tensors of all shards."""
    entries: dict[str, Entry] = {}
    for file in files:
        found, _ = read_header(file)
        if twice := entries.keys() & found.keys():
            raise WeightsError(
                f"{file} holds tensors that another file beside it holds too: {some(sorted(twice))}."
            )
        entries |= found
    return entries


def read_encoder(path: Path) -> tuple[str, Part]:
    """Name and part of a file that holds one text encoder and nothing else: "clip_l", "clip_g" or "t5"."""
    entries, metadata = read_header(path)
    config = own_config(path, metadata)
    if "scaled_fp8" in entries:
        raise WeightsError(f"{path} is {other_kind(['scaled_fp8'])}.")
    words = "embeddings.token_embedding.weight"
    embedding = entries.get(f"text_model.{words}", entries.get(words))
    if any(key.startswith("encoder.block.") for key in entries):
        part = "t5"
    elif any(key.startswith("transformer.resblocks.") for key in entries):
        part = "clip_g"
    elif embedding is not None and not any(key.startswith("vision_model.") for key in entries):
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
    """Text encoder files beside an SD3 file (or in text_encoders/ there), the largest (of the finest dtype) first for each
    part, and why others of them cannot be used.
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
    return {part: sorted(encoders, key=total_size, reverse=True) for part, encoders in found.items()}, notes


def total_size(part: Part) -> int:
    """Bytes of all tensors of a part."""
    return sum(entry.size for entry in part.entries.values())
