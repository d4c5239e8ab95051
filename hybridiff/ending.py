"""How a rank speaks and how it ends: output that cannot fail, Ctrl-C that works in the middle of a wait, errors in one sentence."""

import os
import signal
import socket
import sys
import threading
from typing import Callable, TextIO

import torch
from tqdm import tqdm

NAME = "train_free_sample.py"
GRACE = 1.0  # seconds that the main thread has to end by itself after Ctrl-C
SOON = 0.2  # seconds within which Ctrl-C reaches all ranks
came, over = threading.Event(), threading.Event()  # Ctrl-C when all work was done; the end of `main`


class Forgiving:
    """A stream that never fails: once it is closed or its disk is full, what is written to it is dropped."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        stream.reconfigure(
            errors="backslashreplace"
        )  # what its encoding lacks, such as anything but ASCII under LANG=C

    def attempt(self, do: Callable, *given: str) -> None:
        try:
            do(*given)
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


def prepare_streams() -> None:
    """Let stdout and stderr never fail; one that was closed from the start goes nowhere."""
    sys.stdout, sys.stderr = (
        Forgiving(stream or open(os.devnull, "w")) for stream in (sys.stdout, sys.stderr)
    )


def say(text: str, error: bool = False) -> None:
    """A line on stdout, or a sentence on stderr with the program's name before it; a progress bar makes way for it."""
    stream = sys.stderr if error else sys.stdout
    text = shown(text, 1200) if error else text
    with tqdm.external_write_mode(file=stream):
        print(f"{NAME}: {text}" if error else text, file=stream, flush=True)


def shown(text: str, most: int = 300) -> str:
    """Text for one line of a terminal: control characters and lone surrogates as escapes, the end left out where it is long."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])
    return plain + (f" ... ({len(text):,} characters)" if len(text) > most else "")


def end_on_interrupt(speaks: bool) -> None:
    """Ctrl-C raises KeyboardInterrupt; where the main thread cannot notice it, as in a wait within torch, the process ends GRACE seconds later."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)

    def watch(keep: socket.socket) -> None:
        while ours.recv(1) != bytes([signal.SIGINT]):
            pass
        if not over.wait(GRACE):
            if speaks:
                say("interrupted", error=True)
            os._exit(1)

    threading.Thread(target=watch, args=(theirs,), daemon=True).start()


def finish_despite_interrupts() -> None:
    """All work of this rank is done: Ctrl-C is only noted from here on, so that the ranks end alike; what takes longer than GRACE still ends then."""
    signal.signal(signal.SIGINT, lambda *_: came.set())


def by_interrupt(error: BaseException, lost: bool) -> bool:
    """Whether this process ends because of Ctrl-C; `lost`: as another rank has ended, which may have had it a little earlier. Ctrl-C does nothing more after this."""
    try:
        interrupted = isinstance(error, KeyboardInterrupt) or (lost and came.wait(SOON))
    except KeyboardInterrupt:
        interrupted = True
    end_of_work()
    return interrupted


def end_of_work() -> None:
    """Ctrl-C does nothing more: without this, Python ends by the signal where it comes while the interpreter shuts down."""
    over.set()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def in_a_sentence(error: BaseException, rank: int, step: int, doing: str) -> str:
    """What is said of an error that nobody expected: the rank, the step, what it was doing, and what went wrong."""
    where = f"rank {rank}{f' in step {step}' if step >= 0 else ''} at '{doing}'"
    told = " ".join(str(error).split())
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in told:
        return f"{where} ran out of memory ({told[:200] or 'MemoryError'}): try a smaller --height and --width, --tiles, or another --dtype."
    return (
        f"{where} failed: {type(error).__name__}: {told[:300]} (HYBRIDIFF_TRACE=1 shows where in the code)."
    )
