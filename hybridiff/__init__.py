"""hybridiff: one image, two GPUs, and you can read all of it."""

__version__ = "0.1.0"
__all__ = ["open_checkpoint", "sample"]

from hybridiff.session import sample
from weights.load import open_checkpoint
