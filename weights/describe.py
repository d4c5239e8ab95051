"""What a checkpoint is and what it still needs to make a picture, from headers alone (`--check`)."""

from weights.files import WeightsError
from weights.load import Checkpoint

NEEDED = ("denoiser", "vae", "clip_l", "clip_g")
PARTS = {"sdxl": NEEDED, "sd3": (*NEEDED, "t5")}  # T5 can be left out
TITLES = {
    "unet": "U-Net",
    "mmdit": "MMDiT",
    "vae": "autoencoder",
    "clip": "CLIP text encoder",
    "t5": "T5 encoder",
}
SOURCES = {
    "clip_l": "clip_l.safetensors", "clip_g": "clip_g.safetensors",
    "t5": "t5xxl_fp16.safetensors or t5xxl_fp8_e4m3fn.safetensors",
}  # fmt: skip
ENCODER_HOME = "https://huggingface.co/stabilityai/stable-diffusion-3-medium/tree/main/text_encoders"


def where_to_get(checkpoint: Checkpoint, part: str) -> str:
    """One sentence: how to come by a missing part."""
    note = f" ({'; '.join(checkpoint.notes[part])})" if part in checkpoint.notes else ""
    if checkpoint.layout == "folder":
        return f"{part} is missing{note}: fetch its sub-folder of the same repository."
    if part in SOURCES:
        beside = " and put it beside the checkpoint, or" if checkpoint.family == "sd3" else " and"
        return f"{part} is missing{note}: fetch {SOURCES[part]} from {ENCODER_HOME}{beside} name it by --text-encoders."
    return f"{part} is missing{note}: this is not the whole model; fetch the official single file."


def needs(checkpoint: Checkpoint, t5: bool = True) -> list[str]:
    """What is missing to make a picture and where to get it, one sentence each; empty if nothing is.

    T5 itself is never needed; its tokenizer is where T5 is there and used (`t5`).
    """
    missing = [where_to_get(checkpoint, part) for part in NEEDED if part not in checkpoint.parts]
    if t5 and checkpoint.unusable and "t5" not in checkpoint.parts:
        missing.append(
            f"{checkpoint.unusable}; or name another T5 by --text-encoders, or leave T5 out with --no-t5."
        )
    for part in ("clip_l", "clip_g", "t5"):
        if part in checkpoint.parts and (t5 or part != "t5") and not checkpoint.ships_tokenizer(part):
            try:
                checkpoint.tokenizer(part)
            except WeightsError as error:
                missing.append(str(error))
    return missing


def describe(checkpoint: Checkpoint, t5: bool = True) -> str:
    """Family, layout, parts with sizes and dtypes, and what is needed, as text of a few lines."""
    layout = {"single": "official single file", "folder": "Hugging Face folder"}[checkpoint.layout]
    lines = [f"{checkpoint.path}: {checkpoint.family.upper()}, {layout}"]
    for part in PARTS[checkpoint.family]:
        if part not in checkpoint.parts:
            lines.append(f"  {part:<9} missing" + (", can be left out" if part == "t5" else ""))
            continue
        fitted = checkpoint.part(part)
        parameters = sum(tensor.numel() for tensor in fitted.module.state_dict().values())
        stored = fitted.bytes_by_dtype
        lines.append(
            f"  {part:<9} {TITLES[fitted.kind]}, {parameters / 1e6:,.1f} M parameters, {', '.join(stored)},"
            f" {stored.total() / 1e6:,.1f} MB"
        )
    lines += checkpoint.remarks
    missing = needs(checkpoint, t5)
    if "t5" not in checkpoint.parts and checkpoint.family == "sd3" and not checkpoint.unusable:
        lines.append(f"Optional: {where_to_get(checkpoint, 't5')}")
    lines += [f"Needed: {sentence}" for sentence in missing] or ["Nothing is missing: a picture can be made."]
    return "\n".join(lines)
