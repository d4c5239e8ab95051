"""hybridiff: one image, two GPUs, and you can read all of it."""

__version__ = "0.1.0"
