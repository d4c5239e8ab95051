"""How the ranks of a run find each other, on which machine and GPU each is, and what torch.distributed's errors mean.

All that a run keeps in the store (addresses, barriers, counters) lies under a prefix of its own, as torchrun keeps one store while it
restarts ranks (--max-restarts), and may share it with other runs.
"""

import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from hybridiff.errors import UsageError

ENDED = (  # in errors that can only mean that the process at the other end is no more
    "onnection closed by",
    "onnection reset by peer",
    "roken pipe",
    "ailed to recv, got 0 bytes",
)
SILENT = (
    "imed out waiting",
    "imed out after",
    "wait timeout after",
    "pplication timeout",
    "ocket has timed out",
)
EVERY = 0.5  # seconds between two looks of the watchdog


def join(rank: int, world: int, timeout: timedelta, attempt: int) -> dist.Store:
    """Start the gloo group of all ranks, for words between them; the store for counters that all share. UsageError where the ranks cannot meet.

    `attempt`: how often torchrun has restarted the ranks.
    """
    machines = os.environ.get("GROUP_WORLD_SIZE", "1")
    again = "start the whole run anew, several pictures with `resume`."
    if attempt and machines != "1":
        raise UsageError(
            f"torchrun has restarted the ranks, which works on one machine only, not on {machines}: {again}"
        )
    address = os.environ.get("MASTER_ADDR", "localhost")
    try:
        socket.getaddrinfo(address, None)
    except (OSError, UnicodeError):
        raise UsageError(
            f"rank {rank} cannot meet the others: there is no machine {address!r} (MASTER_ADDR); see --master_addr of torchrun."
        ) from None
    store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=timeout))
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    store = dist.PrefixStore(f"hybridiff run {run}, attempt {attempt}, {world} ranks", store)
    # restarted without counting, as other machines have left or come
    if store.add(f"rank {rank} was here", 1) > 1:
        raise UsageError(
            f"torchrun has started rank {rank} twice in one attempt, after a change of machines: {again}"
        )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    return dist.PrefixStore("counters", store)


def meeting_place() -> str:
    """Where the ranks find each other: rank 0's machine and port."""
    return ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))


def no_answer() -> str | None:
    """Why a connection to that place fails now, to follow "but"; None where it does not."""
    address, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    try:
        socket.create_connection((address, int(port)), timeout=1).close()
    except (OSError, ValueError) as error:
        return f"there was no connection ({getattr(error, 'strerror', None) or error})"
    return None


def no_meeting(error: BaseException) -> str | None:
    """What is wrong with the place where the ranks are to meet, as far as the error of torch.distributed says; None where a rank is missing or has ended."""
    text, address = str(error), meeting_place()
    if "EADDRINUSE" in text or "in use" in text:
        return f"{address} is taken; give torchrun another --master_port, or --standalone."
    if "EADDRNOTAVAIL" in text:
        return f"there is no machine {address}; see --master_addr of torchrun."
    if "Unable to find address for" in text:
        interface = text.rpartition(":")[2].strip()
        return f"there is no network interface {interface!r} with an address here; see GLOO_SOCKET_IFNAME."
    if isinstance(error, ValueError):
        return f"{address} is no place to meet (MASTER_ADDR, MASTER_PORT); start them by torchrun."
    return None


def cause(error: BaseException, timeout: timedelta) -> str:
    """Why a wait for other ranks has failed, to follow "but": that they have ended or are silent where that is certain, else the error's own words."""
    text = str(error)
    if any(words in text for words in ENDED):
        return "the other side has ended"
    if any(words in text for words in SILENT):
        _, knocked, address = text.partition("while trying to connect to ")
        whence = f" from {address.splitlines()[0].rstrip('.')}" if knocked else ""
        return f"nothing came{whence} for {timeout.total_seconds():g} seconds (`timeout`)"
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    _, last, more = text.partition("Last error:")  # NCCL's own cause stands at the end
    if last and last not in first:
        first = f"{first[:150]} ... {last} {' '.join(more.split())}"
    advice = "; GLOO_SOCKET_IFNAME names the network interface to use" if "connectFullMesh" in text else ""
    return f"that failed: {first[:400].rstrip('.')}{advice}"


class AtMost:
    """Calls `late` where what is within takes more than so many seconds (by up to EVERY): some waits of torch.distributed know no timeout, such as
    those for a stopped rank 0 at the start. Such waits may nest, in any thread; one thread looks at the deadlines of all.
    """

    waits: dict["AtMost", float] = {}  # deadlines by `time.monotonic`
    lock = threading.Lock()
    watchdog: threading.Thread | None = None

    def __init__(self, seconds: float, late: Callable[[], None]):
        self.seconds, self.late = seconds, late

    def __enter__(self) -> None:
        if AtMost.watchdog is None:
            with AtMost.lock:
                if AtMost.watchdog is None:
                    AtMost.watchdog = threading.Thread(target=look, daemon=True)
                    AtMost.watchdog.start()
        AtMost.waits[self] = time.monotonic() + self.seconds

    def __exit__(self, *error: object) -> None:
        AtMost.waits.pop(self, None)


def look() -> None:
    """The watchdog: call `late` of every wait that is beyond its deadline."""
    while True:
        time.sleep(EVERY)
        now = time.monotonic()
        for wait, deadline in list(AtMost.waits.items()):
            if now > deadline and AtMost.waits.pop(wait, None):
                wait.late()


class Place(NamedTuple):
    """Where a rank runs."""

    machine: str  # the same for the ranks of one machine, or of one container, and for no others
    node: str  # torchrun's number of the machine
    gpu: str | None  # the UUID of its GPU; None on the CPU
    problem: str | None  # why NCCL cannot carry its values whatever the others have, see `nccl_problem`


def this_place(device: torch.device | None) -> Place:
    """Of this process and its device, None where it has none yet."""
    boots = []
    for file in ("/proc/sys/kernel/random/boot_id", "/etc/machine-id"):
        try:
            boots.append(Path(file).read_text().strip())
        except OSError:  # not on Linux
            pass
    cuda = device is not None and device.type == "cuda"
    return Place(
        " ".join([socket.gethostname(), *boots[:1]]),
        os.environ.get("GROUP_RANK", "0"),
        str(torch.cuda.get_device_properties(device).uuid) if cuda else None,
        nccl_problem(device) if device else None,
    )


def nccl_problem(device: torch.device) -> str | None:
    """Why NCCL cannot carry this rank's values, as far as it can tell by itself."""
    if device.type != "cuda":
        return f"the values lie on the {device.type}, and NCCL carries those of CUDA devices only"
    if not dist.is_nccl_available():
        return "this build of torch has no NCCL"
    return None


def no_nccl(places: Sequence[Place]) -> str | None:
    """Why NCCL cannot carry values between ranks at these places, None where it can."""
    if problem := next((place.problem for place in places if place.problem), None):
        return problem
    counts = Counter(place.gpu for place in places if place.gpu)
    gpu = next((gpu for gpu, count in counts.items() if count > 1), None)
    return f"{counts[gpu]} ranks share one GPU (UUID {gpu}), and NCCL needs one each" if gpu else None
