"""Files of prompts: a prompt a line, JSON objects with settings of their own, or one JSON array of both."""

import json
import re
from pathlib import Path
from typing import Any

from hybridiff.errors import UsageError, printable

OWN = {
    "prompt": str,
    "negative_prompt": str,
    "seed": int,
    "height": int,
    "width": int,
    "guidance": float,
}  # what an entry may say


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
                f"--prompts {path} begins like a JSON array but is none ({printable(str(error))})."
            ) from None
        found = [read_entry(f"entry {number} of {path}", entry) for number, entry in enumerate(entries, 1)]
    else:
        lines = text.split("\n")  # splitlines would also end them at characters that JSON may hold
        found = [
            read_line(f"line {number} of {path}", line)
            for number, line in enumerate(lines, 1)
            if line.strip() and not is_comment(line)
        ]
    if not found:
        raise UsageError(f"--prompts {path} has no prompt in it: give one a line.")
    return found


def read_line(where: str, line: str) -> dict[str, Any]:
    """What one line asks for."""
    if not line.lstrip().startswith("{"):
        return {"prompt": line.strip()}
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} begins like JSON but is none ({error}).") from None
    return read_entry(where, entry)


def read_entry(where: str, entry: Any) -> dict[str, Any]:
    """What one JSON value asks for: a prompt, or an object of names of OWN. Whole numbers may be written as floats."""
    entry = {"prompt": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict):
        raise UsageError(f"{where} must be a prompt or an object with one, not {entry!r:.80}.")
    for name, value in entry.items():
        if name not in OWN:
            raise UsageError(f"{where} says {name!r:.80}, which is not known: give {', '.join(OWN)}.")
        if OWN[name] is int and isinstance(value, float) and value.is_integer():
            entry[name] = value = int(value)
        wanted = (int, float) if OWN[name] is float else OWN[name]
        if not isinstance(value, wanted) or isinstance(value, bool):
            kind = {str: "a text", int: "a whole number", float: "a number"}[OWN[name]]
            raise UsageError(f"{where}: {name} must be {kind}, not {value!r:.80}.")
        if OWN[name] is float and abs(value) > 1e300:
            raise UsageError(f"{where}: {name} is out of range: give a number such as 5.")
    if "prompt" not in entry:
        raise UsageError(f"{where} has no prompt.")
    return entry
