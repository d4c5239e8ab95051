"""The one exception that means: the user can mend this. Its message is one sentence: what, where, what to do."""

import torch
from torch import Tensor


class UsageError(Exception):
    """A mistake in options, files or surroundings; shown without a traceback; exit status 2 on every rank, 1 where the work had begun."""


class NameTaken(UsageError):
    """A file of this name, which was free when the work began, is there when it shall be written."""


class SharedError(UsageError):
    """The same, of which every rank of the team knows already."""


def require_finite(tensor: Tensor, stage: str, name: str, advice: str) -> None:
    """UsageError that names the stage and the tensor, and says what to try, if the tensor holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        count = int((~torch.isfinite(tensor)).sum())
        share = f"{count:,} of {tensor.numel():,} values"
        raise UsageError(f"NaN or infinity in {share} of the {name} ({stage}): {advice}.")
