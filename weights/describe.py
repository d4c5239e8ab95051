"""What a checkpoint is and what it still needs to make a picture, from headers alone (`--check`)."""

from weights.checkpoint import Checkpoint
from weights.files import WeightsError


def where_to_get(checkpoint: Checkpoint, part: str) -> str:
    """One sentence: how to come by a missing part."""
    model, why = checkpoint.model, checkpoint.problems.get(part)
    missing = f"{part} is missing ({'; '.join(why)})" if why else f"{part} is missing"
    if checkpoint.layout == "folder":
        return f"{missing}: fetch its sub-folder of the same repository."
    if part in model.sources:
        beside = " and put it beside the checkpoint, or" if model.beside else " and"
        return f"{missing}: fetch {model.sources[part]}{beside} name it by --text-encoders."
    return f"{missing}: this is not the whole model; fetch the official single file."


def needs(checkpoint: Checkpoint, t5: bool = True) -> list[str]:
    """What is missing to make a picture and where to get it, one sentence each; empty if nothing is.

    A part that can be left out is never needed; its tokenizer is if the part is there and used (`t5`).
    """
    parts = checkpoint.model.parts
    needed = [name for name, part in parts.items() if not part.optional and name not in checkpoint.parts]
    missing = [where_to_get(checkpoint, name) for name in needed]
    for name, why in checkpoint.unusable.items():
        if t5 and name not in checkpoint.parts:
            missing.append(f"{why}; or name another T5 by --text-encoders, or leave T5 out with --no-t5.")
    for name in checkpoint.text_encoders:
        if (t5 or not parts[name].optional) and not checkpoint.ships_tokenizer(name):
            try:
                checkpoint.tokenizer(name)
            except WeightsError as error:
                missing.append(str(error))
    return missing


def left_out(checkpoint: Checkpoint) -> list[str]:
    """Names of the parts that a picture is made without."""
    parts = checkpoint.model.parts
    return [name for name, part in parts.items() if part.optional and name not in checkpoint.parts]


def describe(checkpoint: Checkpoint, t5: bool = True) -> str:
    """Family, layout, parts with sizes and dtypes, and what is needed, as text of a few lines."""
    layout = {"single": "official single file", "folder": "Hugging Face folder"}[checkpoint.layout]
    lines = [f"{checkpoint.path}: {checkpoint.model.title}, {layout}"]
    for name, part in checkpoint.model.parts.items():
        if name not in checkpoint.parts:
            lines.append(f"  {name:<9} missing" + (", can be left out" if part.optional else ""))
            continue
        checked = checkpoint.part(name)
        parameters = sum(tensor.numel() for tensor in checked.module.state_dict().values())
        stored = checked.bytes_by_dtype
        lines.append(
            f"  {name:<9} {part.network.title}, {parameters / 1e6:,.1f} M parameters, {', '.join(stored)},"
            f" {stored.total() / 1e6:,.1f} MB"
        )
    lines += checkpoint.remarks
    missing = needs(checkpoint, t5)
    for name in left_out(checkpoint):
        if name not in checkpoint.unusable:
            lines.append(f"Optional: {where_to_get(checkpoint, name)}")
    lines += [f"Needed: {sentence}" for sentence in missing] or ["Nothing is missing: a picture can be made."]
    return "\n".join(lines)
