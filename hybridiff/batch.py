"""Many pictures in one run: what is to be made, which team makes which, and what has been made.

A team of ranks takes the next picture as soon as it is free. Every finished or failed picture is a line of DIR/manifest.jsonl; a picture
is written whole or not at all, so that a run that was cut short can go on where it stopped.
"""

import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridiff.ending import say, shown
from hybridiff.errors import NameTaken, UsageError
from hybridiff.pipeline import agree
from hybridiff.report import read_text, write_whole
from hybridiff.transport import Transport, place

OWN = {
    "prompt": str,
    "negative_prompt": str,
    "seed": int,
    "height": int,
    "width": int,
    "guidance": float,
}  # what a line may say


@dataclass(frozen=True)
class Job:
    """One picture to be made: its number (from 0), its file, and what differs from the options of the run."""

    number: int
    path: Path
    own: dict[str, Any]  # of the names in OWN; "prompt" and "seed" always


def text_of_prompts(path: Path, ranks: int = 1) -> str:
    """What a file of prompts holds. UsageError where it cannot be read, or not by each of several ranks."""
    pipe = path.exists() and not (path.is_file() or path.is_dir())
    if ranks > 1 and (pipe or str(path).startswith(("/dev/fd/", "/proc/self/fd/"))):
        raise UsageError(
            f"--prompts {path} is a pipe, which {ranks} ranks cannot all read: save the prompts in a file, and give that."
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"--prompts {path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise UsageError(f"--prompts {path} is not a text in UTF-8: save it so.") from None


def is_comment(line: str) -> bool:
    """Whether a line of a file of prompts is a comment."""
    return f"{line.strip()} ".startswith("# ")


def read_prompts(path: Path, text: str | None = None) -> list[dict[str, Any]]:
    """The pictures that a file (or its `text`, if that is known) asks for; UsageError says what in it is wrong.

    A prompt a line, or a JSON object a line with "prompt" and any other names of OWN, or one JSON array of prompts and such objects.
    """
    text = text_of_prompts(path) if text is None else text
    if re.match(r"\s*\[\s*[\[{\"\]]", text):
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"--prompts {path} begins like a JSON array but is none ({shown(str(error))})."
            ) from None
        told = [read_entry(f"entry {number} of {path}", entry) for number, entry in enumerate(entries, 1)]
    else:
        lines = text.split("\n")  # splitlines would also end them at characters that JSON may hold
        told = [
            read_line(f"line {number} of {path}", line)
            for number, line in enumerate(lines, 1)
            if line.strip() and not is_comment(line)
        ]
    if not told:
        raise UsageError(f"--prompts {path} has no prompt in it: give one a line.")
    return told


def read_line(where: str, line: str) -> dict[str, Any]:
    """What one line asks for."""
    if not line.lstrip().startswith("{"):
        return {"prompt": line.strip()}
    try:
        told = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} begins like JSON but is none ({error}).") from None
    return read_entry(where, told)


def read_entry(where: str, told: Any) -> dict[str, Any]:
    """What one JSON value asks for: a prompt, or an object of names of OWN. Whole numbers may be written as floats."""
    told = {"prompt": told} if isinstance(told, str) else told
    if not isinstance(told, dict):
        raise UsageError(f"{where} must be a prompt or an object with one, not {told!r:.80}.")
    for name, value in told.items():
        if name not in OWN:
            raise UsageError(f"{where} says {name!r:.80}, which is not known: give {', '.join(OWN)}.")
        if OWN[name] is int and isinstance(value, float) and value.is_integer():
            told[name] = value = int(value)
        wanted = (int, float) if OWN[name] is float else OWN[name]
        if not isinstance(value, wanted) or isinstance(value, bool):
            kind = {str: "a text", int: "a whole number", float: "a number"}[OWN[name]]
            raise UsageError(f"{where}: {name} must be {kind}, not {value!r:.80}.")
        if OWN[name] is float and abs(value) > 1e300:
            raise UsageError(f"{where}: {name} is out of range: give a number such as 5.")
    if "prompt" not in told:
        raise UsageError(f"{where} has no prompt.")
    return told


def make_jobs(told: Sequence[dict[str, Any]], each: int, seed: int, folder: Path) -> list[Job]:
    """`each` pictures of everything told, in its order; the n-th of them (from 0) has the line's own seed, or `seed`, plus n."""
    pictures = [{**own, "seed": own.get("seed", seed) + n} for own in told for n in range(each)]
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
        """Append the line of a picture in a single write, so that lines of several teams do not mix. UsageError where that fails."""
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
    told = read_text(job.path)
    try:
        same = without_ranks(json.loads(told["settings"])) == without_ranks(settings)
        return same and told["seed"] == str(job.own["seed"]) and run in (None, told.get("run"))
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
    manifest, problem = Manifest(folder), None
    batch = hashlib.sha256(
        json.dumps([[without_ranks(told), job.own["seed"]] for job, told in zip(jobs, settings)]).encode()
    ).hexdigest()
    head = {"batch": batch, **head, "pictures": len(jobs)}
    made = {job.number for job, told in zip(jobs, settings) if resume and already_made(job, told, only)}
    strange = None
    if not overwrite:
        if not resume and next(itertools.chain(folder.glob("*.png"), folder.glob("manifest.jsonl")), None):
            problem = f"--out {folder} holds pictures already: give --resume to go on with them, --overwrite, or another folder."
        strange = next(
            (job.path for job in jobs if job.number not in made and os.path.lexists(job.path)), None
        )
    agree(transport, problem)
    files = transport.gather(
        (sorted(made), strange and str(strange))
    )  # on several machines each knows its own
    made = {number for numbers, _ in files for number in numbers}
    strange = next((path for _, path in files if path), None)
    if transport.rank == 0:
        try:
            goes_on = resume and manifest.path.exists()
            before = manifest.last_lines(head) if goes_on else {}
            if strange:
                raise UsageError(
                    f"{strange} is another picture than this run would make: choose another --out, or add --overwrite."
                )
            if made and not (goes_on and manifest.read()[0].get("weights")):
                say(
                    f"Nothing in {folder} says with which weights the pictures that are there were made: they are taken to be of these."
                )
            lines = [
                line
                for job in jobs
                if (line := line_after(job, before.get(job.number, {}), job.number in made))
            ]
            manifest.begin(head, lines, overwrite=overwrite or goes_on)
        except UsageError as error:
            problem = str(error)
    agree(transport, problem)
    failed = set()
    if place()[2] == 0:  # the first rank of every machine, whose folder may be its own
        try:
            if transport.rank:
                begin_here(manifest, head, resume, overwrite)
            last = manifest.last_lines(head) if resume else {}
            failed = {number for number, line in last.items() if line.get("status") == "failed"}
        except UsageError as error:
            problem = str(error)
    agree(transport, problem)
    failed = set().union(*transport.gather(sorted(failed)))
    return manifest, sorted(
        (job for job in jobs if job.number not in made), key=lambda job: job.number in failed
    )


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
    """The jobs that fall to this rank's team, one after the other as the team becomes free; returns when all teams are done."""
    while True:
        taken = transport.add("jobs taken") - 1 if transport.rank == 0 else None
        taken = transport.gather(taken)[0]
        if taken >= len(jobs):
            break
        yield jobs[taken]
    transport.until_all_come()


class Progress:
    """Counts over all teams, and says how long the rest will take."""

    def __init__(self, total: int, transport: Transport):
        self.total, self.transport, self.start = total, transport, time.monotonic()

    def ended(self, words: str) -> None:
        """A picture of this team has ended: one line, with an estimate of the time left from the pictures so far."""
        done = self.transport.add("jobs ended")
        left = (time.monotonic() - self.start) / done * (self.total - done)
        rest = f", about {duration(left)} left" if done < self.total else ""
        say(f"{done}/{self.total} {words}{rest}")


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
