"""Many pictures in one run: what is to be made, which replica makes which, and what has been made.

A replica, a set of ranks, takes the next picture as soon as it is free. Every finished or failed picture is a line of DIR/manifest.jsonl; a picture
is written whole or not at all, so that a run that was cut short can go on where it stopped.
"""

import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridiff.app.console import log
from hybridiff.app.files import read_text, write_whole
from hybridiff.distributed.transport import Transport, place
from hybridiff.errors import NameTaken, UsageError, raise_together


@dataclass(frozen=True)
class Job:
    """One picture to be made: its number (from 0), its file, and what differs from the options of the run."""

    number: int
    path: Path
    own: dict[str, Any]  # of the names in prompts.OWN; "prompt" and "seed" always


def make_jobs(entries: Sequence[dict[str, Any]], each: int, seed: int, folder: Path) -> list[Job]:
    """`each` pictures of every entry, in order; the n-th of them (from 0) has the line's own seed, or `seed`, plus n."""
    pictures = [{**own, "seed": own.get("seed", seed) + n} for own in entries for n in range(each)]
    digits = max(4, len(str(len(pictures))))
    return [Job(number, folder / f"{number + 1:0{digits}}.png", own) for number, own in enumerate(pictures)]


class Manifest:
    """DIR/manifest.jsonl: a first line that says what the whole batch is, then one a picture, as they end."""

    def __init__(self, folder: Path):
        self.path = folder / "manifest.jsonl"

    def read(self) -> list[dict]:
        """The head and the lines of pictures; what is neither, such as a line that a kill has torn, is left out. UsageError where the file is no manifest."""
        lines = []
        try:
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    lines.append(json.loads(line))
                except (ValueError, RecursionError):
                    continue
        except OSError as error:
            raise UsageError(
                f"{self.path} cannot be read ({error.strerror or error}): choose another --out."
            ) from None
        except UnicodeDecodeError:
            lines = []
        head = lines[0] if lines and isinstance(lines[0], dict) else {}
        if (
            not isinstance(head.get("batch"), str)
            or type(head.get("seed")) is not int
            or "pictures" not in head
        ):
            raise UsageError(f"{self.path} is no manifest of a batch: choose another --out.")
        return [head] + [
            line for line in lines[1:] if isinstance(line, dict) and type(line.get("number")) is int
        ]

    def run(self) -> str | None:
        """The run that began the file; None where there is no manifest or it does not say."""
        try:
            return self.read()[0].get("run")
        except UsageError:
            return None

    def last_lines(self, like: dict) -> dict[int, dict]:
        """Number of a picture -> its last line. UsageError where the file is of another batch than the head `like`, or of other weights."""
        head, *lines = self.read()
        if head["batch"] != like["batch"]:
            raise UsageError(
                f"{self.path} belongs to other prompts or options: give the same ones with --resume, or another --out."
            )
        if (head.get("weights") or like["weights"]) != like["weights"]:
            raise UsageError(
                f"{self.path} belongs to other weights, text encoders or tokenizers of the same name: give the same ones with --resume, or another --out."
            )
        return {line["number"]: line for line in lines}

    def begin(self, head: dict, lines: Sequence[dict], overwrite: bool) -> None:
        """Write the file with its first line and the lines that are known already. UsageError where that fails, or without `overwrite` where it is there."""
        text = "".join(json.dumps(line) + "\n" for line in (head, *lines))
        try:
            write_whole(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"), overwrite)
        except NameTaken:
            raise NameTaken(
                f"Another run has just begun in {self.path.parent}: choose another --out, or give --resume when it has ended."
            ) from None

    def add(self, line: dict) -> None:
        """Append the line of a picture in a single write, so that lines of several replicas do not mix. UsageError where that fails."""
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                os.write(file, (json.dumps(line) + "\n").encode())
            finally:
                os.close(file)
        except OSError as error:
            raise UsageError(f"{self.path} could not be written ({error.strerror}).") from None


def without_ranks(settings: dict) -> dict:
    """Settings but for the number of ranks, which may be another when a batch goes on."""
    return {name: value for name, value in settings.items() if name != "ranks"}


def already_made(job: Job, settings: dict, run: str | None = None) -> bool:
    """Whether the job's file is there and holds this job's picture, with `run` as made by this run."""
    metadata = read_text(job.path)
    try:
        same = without_ranks(json.loads(metadata["settings"])) == without_ranks(settings)
        return same and metadata["seed"] == str(job.own["seed"]) and run in (None, metadata.get("run"))
    except (KeyError, ValueError, AttributeError, RecursionError):
        return False


def begin(
    jobs: Sequence[Job],
    settings: Sequence[dict],
    head: dict,
    resume: bool,
    overwrite: bool,
    only: str | None,
    transport: Transport,
) -> tuple[Manifest, list[Job]]:
    """Start a batch, or with `resume` go on with it: the manifest and the jobs that are still to be made. Every rank calls it.

    `settings` are the jobs' own; `head` has the seed, the weights and the run; `only`: the pictures of this run alone count as made. Jobs that failed before come last.
    SharedError where the folder cannot be written, holds another batch or, without `overwrite`, pictures that are not of this one.
    """
    folder = jobs[0].path.parent
    manifest = Manifest(folder)
    wanted = [[without_ranks(own), job.own["seed"]] for job, own in zip(jobs, settings)]
    head = {"batch": hashlib.sha256(json.dumps(wanted).encode()).hexdigest(), **head, "pictures": len(jobs)}
    made = {job.number for job, own in zip(jobs, settings) if resume and already_made(job, own, only)}
    strange = None
    with raise_together(transport.all_gather):
        if not overwrite:
            in_use = next(itertools.chain(folder.glob("*.png"), folder.glob("manifest.jsonl")), None)
            if in_use and not resume:
                raise UsageError(
                    f"--out {folder} holds pictures already: give --resume to go on with them, --overwrite, or another folder."
                )
            left = (job for job in jobs if job.number not in made)
            strange = next((job.path for job in left if os.path.lexists(job.path)), None)
    # on several machines each knows its own files
    files = transport.all_gather((sorted(made), strange and str(strange)))
    made = {number for numbers, _ in files for number in numbers}
    strange = next((path for _, path in files if path), None)
    with raise_together(transport.all_gather):
        if transport.rank == 0:
            begin_manifest(manifest, head, jobs, made, strange, resume, overwrite)
    failed = set()
    with raise_together(transport.all_gather):
        if place()[2] == 0:  # the first rank of every machine, whose folder may be its own
            if transport.rank:
                begin_here(manifest, head, resume, overwrite)
            last = manifest.last_lines(head) if resume else {}
            failed = {number for number, line in last.items() if line.get("status") == "failed"}
    failed = set().union(*transport.all_gather(sorted(failed)))
    left = [job for job in jobs if job.number not in made]
    return manifest, sorted(left, key=lambda job: job.number in failed)


def begin_manifest(
    manifest: Manifest,
    head: dict,
    jobs: Sequence[Job],
    made: set[int],
    strange: str | None,
    resume: bool,
    overwrite: bool,
) -> None:
    """Rank 0's manifest: begun anew, or with the lines of before that still hold. UsageError where it is another batch's, or `strange` is in the way."""
    goes_on = resume and manifest.path.exists()
    before = manifest.last_lines(head) if goes_on else {}
    if strange:
        raise UsageError(
            f"{strange} is another picture than this run would make: choose another --out, or add --overwrite."
        )
    if made and not (goes_on and manifest.read()[0].get("weights")):
        log(
            f"Nothing in {manifest.path.parent} says with which weights the pictures that are there were made: they are taken to be of these."
        )
    lines = (line_after(job, before.get(job.number, {}), job.number in made) for job in jobs)
    manifest.begin(head, [line for line in lines if line], overwrite=overwrite or goes_on)


def begin_here(manifest: Manifest, head: dict, resume: bool, overwrite: bool) -> None:
    """Start the manifest on a machine that is not rank 0's, if the folder is its own. UsageError where that fails."""
    if manifest.run() == head["run"] or (resume and manifest.path.exists()):
        return
    try:
        manifest.begin(head, [], overwrite)
    except NameTaken:
        if manifest.run() != head["run"]:  # of rank 0, in a folder that both share and that shows it late
            raise


def line_after(job: Job, line: dict, made: bool) -> dict | None:
    """A picture's line when a batch goes on: the last one of before, `line`, where it still holds; None where the picture is to be made as if it had not been."""
    if made:
        return line if line.get("status") == "made" else line_of(job, "made")
    return line if line.get("status") == "failed" else None


def line_of(job: Job, status: str, **more) -> dict:
    """A picture's line in the manifest; status "made" or "failed"."""
    return {"number": job.number, "file": job.path.name, "status": status, **job.own, **more}


def take_turns(jobs: Sequence[Job], transport: Transport) -> Iterator[Job]:
    """The jobs that fall to this rank's replica, one after the other as it becomes free; returns when all replicas are done."""
    while True:
        taken = transport.add("jobs taken") - 1 if transport.rank == 0 else None
        taken = transport.all_gather(taken)[0]
        if taken >= len(jobs):
            break
        yield jobs[taken]
    transport.wait_for_all()


class Progress:
    """Counts over all replicas, and says how long the rest will take."""

    def __init__(self, total: int, transport: Transport):
        self.total, self.transport, self.start = total, transport, time.monotonic()

    def ended(self, words: str) -> None:
        """A picture of this replica has ended: one line, with an estimate of the time left from the pictures so far."""
        done = self.transport.add("jobs ended")
        left = (time.monotonic() - self.start) / done * (self.total - done)
        rest = f", about {duration(left)} left" if done < self.total else ""
        log(f"{done}/{self.total} {words}{rest}")


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
