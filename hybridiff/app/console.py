"""How a rank speaks and how it ends: output that cannot fail, Ctrl-C that works in the middle of a wait, errors in one sentence."""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

import torch
from tqdm import tqdm

from hybridiff.errors import printable

NAME = "train_free_sample.py"
GRACE = 1.0  # seconds that the main thread has to end by itself after Ctrl-C
quiet = False  # --quiet, see `be_quiet`
SOON = 0.2  # seconds within which Ctrl-C reaches all ranks
came, over = threading.Event(), threading.Event()  # Ctrl-C when all work was done; the end of `main`


class SafeStream:
    """A stream that never fails: once it is closed or its disk is full, what is written to it is dropped."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        # what its encoding lacks, such as anything but ASCII under LANG=C
        stream.reconfigure(errors="backslashreplace")

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
        SafeStream(stream or open(os.devnull, "w")) for stream in (sys.stdout, sys.stderr)
    )


def be_quiet(wish: bool) -> None:
    """Whether only errors and results are to be written (--quiet)."""
    global quiet
    quiet = wish


def log(text: str, error: bool = False, result: bool = False) -> None:
    """A line on stdout, which --quiet leaves out unless it is a `result`; or an error's sentence on stderr with the program's name
    before it, recorded for torchrun too. A progress bar makes way for it."""
    if quiet and not error and not result:
        return
    if error:
        text = in_options(text)
        record_failure(text)
    stream = sys.stderr if error else sys.stdout
    text = printable(text, 1200) if error else text
    with tqdm.external_write_mode(file=stream):
        print(f"{NAME}: {text}" if error else text, file=stream, flush=True)


def in_options(error: object) -> str:
    """An error's sentence with its arguments, which stand in backquotes, as options of the command line."""
    return re.sub(r"`(\w+)`", lambda name: "--" + name[1].replace("_", "-"), str(error))


def record_failure(sentence: str, later: int = 0) -> None:
    """Write why this rank fails to the file that torchrun's report is made of (torch/distributed/elastic/multiprocessing/errors); never fails.

    torchrun calls the earliest failure the root cause: `later` seconds are added to the time of one that only follows another rank's.
    """
    path, sentence = os.environ.get("TORCHELASTIC_ERROR_FILE"), printable(in_options(sentence), 1200)
    if not path:
        return
    more = {
        "py_callstack": sentence,
        "timestamp": str(int(time.time()) + later),
    }  # the report shows the former
    part = f"{path}.part"  # torchrun must not find half a file
    try:
        with open(part, "w") as file:
            json.dump({"message": {"message": sentence, "extraInfo": more}}, file)
        os.replace(part, path)
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.unlink(part)


class StepBar:
    """Progress over the steps of a picture, on stderr: a bar on a terminal, else a line at every tenth of the steps.

    Nothing on ranks that do not speak, with --quiet, or where TQDM_DISABLE is set. No bar among the messages of HYBRIDIFF_TRACE.
    """

    def __init__(self, steps: int, stage: str, speaks: bool, traced: bool):
        self.steps, self.done = steps, 0
        shows = speaks and not quiet and not os.environ.get("TQDM_DISABLE")
        bar = shows and sys.stderr.isatty() and not traced
        self.lines = shows and not bar
        self.bar = tqdm(total=steps, desc=stage, disable=not bar, unit="step")

    def step(self, stage: str) -> None:
        """A step of this stage is done."""
        self.done += 1
        self.bar.set_description(stage, refresh=False)
        self.bar.update()
        if self.lines and self.done * 10 // self.steps > (self.done - 1) * 10 // self.steps:
            print(f"step {self.done} of {self.steps}: {stage}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self.bar.close()


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
                log("interrupted", error=True)
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
    words = " ".join(str(error).split())
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in words:
        return f"{where} ran out of memory ({words[:200] or 'MemoryError'}): try a smaller --height and --width, --tiles, or another --dtype."
    return (
        f"{where} failed: {type(error).__name__}: {words[:300]} (HYBRIDIFF_TRACE=1 shows where in the code)."
    )
