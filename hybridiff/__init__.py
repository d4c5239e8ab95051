"""hybridiff: one image, two GPUs, and you can read all of it."""

__version__ = "0.1.0"
__all__ = ["open_checkpoint", "sample"]


def __getattr__(name: str) -> object:
    """`open_checkpoint` and `sample` are imported when they are asked for, so that a part of the package can be imported alone."""
    if name == "open_checkpoint":
        from weights.load import open_checkpoint

        return open_checkpoint
    if name == "sample":
        from hybridiff.session import sample

        return sample
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
