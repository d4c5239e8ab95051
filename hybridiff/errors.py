"""The one exception that means: the user can mend this. Its message is one sentence: what, where, what to do."""

from collections.abc import Callable

import torch
from torch import Tensor

from weights.files import some
from weights.load import Checkpoint


class UsageError(Exception):
    """A mistake in options, files or surroundings; shown without a traceback; exit status 2 on every rank, 1 where the work had begun."""


class NameTaken(UsageError):
    """A file of this name, which was free when the work began, is there when it shall be written."""


class SharedError(UsageError):
    """The same, of which every rank of the team knows already."""


FINER = {torch.float16: "bfloat16 or float32", torch.bfloat16: "float32"}  # precision -> those with more room


def remedy(checkpoint: Checkpoint, part: str, dtype: torch.dtype, otherwise: str) -> str:
    """What to do where a part that computes in `dtype` gave NaN or infinity: its weights are read through for the cause."""
    if entry := checkpoint.not_finite(part):
        return f"tensor {some([entry.key])} in {entry.file} holds NaN or infinity, so fetch that file again or take another"
    return (
        f"try --dtype {FINER[dtype]}, or {otherwise}"
        if dtype in FINER
        else f"the weights are finite, so {otherwise}"
    )


def require_finite(tensor: Tensor, stage: str, name: str, advice: Callable[[], str]) -> None:
    """UsageError that names the stage and the tensor, and says what to try, if the tensor holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        count = int((~torch.isfinite(tensor)).sum())
        share = f"{count:,} of {tensor.numel():,} values"
        raise UsageError(f"NaN or infinity in {share} of the {name} ({stage}): {advice()}.")
