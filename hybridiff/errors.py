"""Errors that the user can mend. Their message is one sentence: what, where, what to do; it names arguments in backquotes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from weights.files import WeightsError, some
from weights.load import Checkpoint


class UsageError(ValueError):
    """A mistake in arguments, files or surroundings; shown without a traceback; exit status 2 on every rank, 1 where the work had begun."""


class SharedError(UsageError):
    """The same, of which every rank of the replica knows already."""


class NameTaken(UsageError):
    """A file has come meanwhile under a name that was free."""


class PeerLost(Exception):
    """A wait for another rank has failed: it has ended, was silent for longer than the timeout, or what the message says. It names the step and what was awaited."""


FINER = {torch.float16: "bfloat16 or float32", torch.bfloat16: "float32"}  # precision -> those with more room


def remedy(checkpoint: Checkpoint, part: str, dtype: torch.dtype, otherwise: str) -> str:
    """What to do where a part that computes in `dtype` gave NaN or infinity: its weights are read through for the cause."""
    if entry := checkpoint.not_finite(part):
        return f"tensor {some([entry.key])} in {entry.file} holds NaN or infinity, so fetch that file again or take another"
    if dtype in FINER:
        return f"try `dtype` {FINER[dtype]}, or {otherwise}"
    return f"the weights are finite, so {otherwise}"


def require_finite(tensor: Tensor, stage: str, name: str, advice: Callable[[], str]) -> None:
    """UsageError that names the stage and the tensor, and says what to try, if the tensor holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        count = int((~torch.isfinite(tensor)).sum())
        share = f"{count:,} of {tensor.numel():,} values"
        raise UsageError(f"NaN or infinity in {share} of the {name} ({stage}): {advice()}.")


def printable(text: str, most: int = 300) -> str:
    """Text for one line of a terminal: control characters and lone surrogates as escapes, the end left out where it is long."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])
    return plain + (f" ... ({len(text):,} characters)" if len(text) > most else "")


@contextmanager
def raise_together(all_gather: Callable[[object], list]) -> Iterator[None]:
    """What is within may fail on some ranks of a replica: SharedError on all of them then, with the first rank's sentence."""
    problem = None
    try:
        yield
    except (UsageError, WeightsError) as error:
        problem = str(error)
    for sentence in all_gather(problem):
        if sentence is not None:
            raise SharedError(sentence)
