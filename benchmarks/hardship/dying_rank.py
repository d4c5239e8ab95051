"""The command line, but one rank dies at a place: `dying_rank.py PLACE HOW RANK MARK options...`, as benchmarks/deaths.py starts it.

When rank RANK comes to PLACE it makes the file MARK and then does HOW: "kill", "term" and "stop" are signals to itself, "exception", "memory" and
"gpu memory" are raised there, "allocate" asks torch for more memory than there is, "wait" waits for an interrupt from outside.
"""

import os
import signal

if __name__ == "__main__":  # as train_free_sample.py has it, which is imported here and not run
    WORD = b"train_free_sample.py: interrupted\n" if os.environ["RANK"] == "0" else b""
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, WORD), os._exit(1)))

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

STEPS = {
    "warm-up": 2,
    "switch": 4,
    "pipeline": 6,
    "last stage": 9,
}  # of 12 with --cap 4 --interval 3: steps 4 to 7 are the middle stage
PLACES = ("start", "meeting", "text", "load", *STEPS, "decode", "save")
HOWS = ("kill", "term", "stop", "exception", "memory", "gpu memory", "allocate", "wait")


def die(how: str, mark: Path) -> None:
    """Once, in the way that is asked for."""
    import torch

    if mark.exists():
        return
    mark.touch()
    if how in ("kill", "term", "stop"):
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}[how])
    if how == "wait":
        time.sleep(60)
    if how == "allocate":
        torch.empty(2**55, dtype=torch.uint8)
    raise {
        "memory": MemoryError(),
        "gpu memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    }.get(how, KeyError("made for a test"))


def arm(place: str, how: str, mark: Path) -> None:
    """Put the death before the function in which the place begins."""
    import hybridiff.denoise
    import hybridiff.distributed.transport
    import hybridiff.pipeline
    import train_free_sample
    from weights.load import Checkpoint

    def before(owner: object, name: str, when=lambda *given: True) -> None:
        whole = getattr(owner, name)

        def do(*given, **named):
            if when(*given):
                die(how, mark)
            return whole(*given, **named)

        setattr(owner, name, do)

    if place == "start":
        before(train_free_sample, "connect")
    elif place == "meeting":
        before(train_free_sample, "prepare")
    elif place == "text":
        before(hybridiff.pipeline, "encode")
    elif place == "load":
        before(Checkpoint, "load", lambda checkpoint, part, *rest: part == "denoiser")
    elif place in STEPS:
        before(hybridiff.denoise.Worker, "perform", lambda worker, operation, i: i == STEPS[place])
    elif place == "decode":
        before(hybridiff.pipeline, "decode")
    elif place == "save":
        before(os, "link")
    if place in ("decode", "save"):  # the ranks that do neither wait for rank 0 there
        before(
            hybridiff.distributed.transport.TorchTransport,
            "all_gather",
            lambda transport, *rest: transport.rank > 0 and transport.doing == place,
        )


def main() -> int:
    place, how, rank, mark, *options = sys.argv[1:]
    import train_free_sample
    from hybridiff.app.console import end_of_work, end_on_interrupt, prepare_streams

    sys.argv[:] = [train_free_sample.__file__, *options]
    prepare_streams()
    end_on_interrupt(speaks=os.environ["RANK"] == "0")
    if os.environ["RANK"] == rank:
        arm(place, how, Path(mark))
    status = train_free_sample.main()
    end_of_work()
    return status


if __name__ == "__main__":
    sys.exit(main())
