"""Files: pictures with their settings inside, names that are taken without replacing, whole or not there."""

import errno
import hashlib
import itertools
import json
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from PIL import ExifTags, Image, PngImagePlugin, features
from torch import Tensor

from hybridiff.errors import NameTaken, UsageError, printable

PICTURE = Path("picture.png")  # where a picture goes that is given no name
PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # suffix: format
# the most pixels a side, as libjpeg and libwebp have it
SIDES = {"PNG": 2**31 - 1, "JPEG": 65_500, "WEBP": 16_383}
JPEG_EXIF = 65_533  # the most bytes that fit in a JPEG's segment
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # of file systems such as exFAT


def free_name(path: Path) -> Path:
    """The path itself, or the first of name-2, name-3, ... that is not there yet."""
    names = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return path if not os.path.lexists(path) else next(name for name in names if not os.path.lexists(name))


def check_writable(path: Path, overwrite: bool) -> None:
    """UsageError unless a file can be made at this path (tried beside it, nothing is left behind)."""
    try:
        if path.is_dir():
            raise UsageError(f"{printable(str(path))} is a directory: give the name of a file.")
        if os.path.lexists(path) and not overwrite:
            raise UsageError(f"{printable(str(path))} is there already: give --overwrite, or another name.")
        probe = beside(path)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"{printable(str(path))} cannot be written ({error.strerror}): choose another place."
        ) from None


def beside(path: Path) -> Path:
    """A hidden name in the same folder that nobody else has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def write_whole(path: Path, write: Callable[[Path], object], overwrite: bool = True) -> None:
    """Write a file by `write(temporary path)`, then give it its name: it is whole or not there. UsageError where that fails.

    Where the file system can, it has no name before it is whole (open(2), O_TMPFILE), so that not even a kill leaves a part of it.
    Without `overwrite` a file that has come under this name meanwhile stays as it is, and NameTaken is raised.
    """
    temporary, nameless = beside(path), None
    try:
        try:
            nameless = os.open(path.parent, os.O_TMPFILE | os.O_RDWR, 0o666)
        except (OSError, AttributeError):
            source = temporary
        else:
            source = Path(f"/proc/self/fd/{nameless}")
        write(source)
        if not overwrite:
            take_name(source, path, nameless)
            return
        if nameless is not None:
            link(source, temporary, nameless)
        os.replace(temporary, path)
    except FileExistsError:
        raise NameTaken(f"{path} was made by another run meanwhile, and is left as it is.") from None
    except OSError as error:
        raise UsageError(f"{path} could not be written ({error.strerror or error}).") from None
    finally:
        if nameless is not None:
            os.close(nameless)
        with suppress(OSError):  # a file system that has become read-only holds no part of it
            temporary.unlink(missing_ok=True)


def picture_format(path: Path) -> str:
    """ "PNG", "JPEG" or "WEBP" by the suffix of a picture's name; PNG where there is none. UsageError where it is another, or cannot be written here."""
    known = PICTURES.get(path.suffix.lower() or ".png")
    if known is None:
        raise UsageError(
            f"--out {printable(str(path))} ends in {printable(path.suffix)}, which is not written here: give a name that ends in {', '.join(PICTURES)}."
        )
    if known != "PNG" and not features.check({"JPEG": "jpg", "WEBP": "webp"}[known]):
        raise UsageError(
            f"--out {printable(str(path))}: the Pillow installed here cannot write {known}; give a name that ends in .png."
        )
    return known


def metadata_of(seed: int, settings: dict, run: str | None = None) -> dict[str, str]:
    """What a picture carries: prompt, seed, settings as JSON, and the run that may be restarted, if there is one."""
    metadata = {"prompt": settings["prompt"], "seed": str(seed), "settings": json.dumps(settings)}
    return metadata | ({"run": run} if run else {})


def exif_of(seed: int, settings: dict, run: str | None = None) -> Image.Exif:
    """Prompt, seed, settings and the run as a JSON object, in ASCII, in the EXIF field ImageDescription."""
    exif = Image.Exif()
    described = {"prompt": settings["prompt"], "seed": seed, "settings": settings}
    exif[ExifTags.Base.ImageDescription] = json.dumps(described | ({"run": run} if run else {}))
    return exif


def check_picture(path: Path, seed: int, settings: dict) -> None:
    """UsageError unless the format of this name can hold a picture of these settings."""
    known = picture_format(path)
    for name in ("height", "width"):
        if settings[name] > SIDES[known]:
            raise UsageError(
                f"--{name} {settings[name]} is too large for a {path.suffix.lower()}, which has at most {SIDES[known]:,} pixels a side: give an --out that ends in .png."
            )
    if known == "JPEG" and len(exif_of(seed, settings, this_run()).tobytes()) > JPEG_EXIF:
        raise UsageError(
            f"--out {printable(str(path))}: a JPEG has room for 64 KB of prompt and settings, and these are longer; give a name that ends in .png or .webp."
        )


def link(source: Path, path: Path, nameless: int | None) -> None:
    """Give a file another name, or its first where it is `nameless` (its descriptor). FileExistsError where there is one of that name."""
    if nameless is None:
        os.link(source, path)
    else:
        # the first argument is absolute; a dir_fd makes it linkat(2)
        os.link(source, path, src_dir_fd=nameless, follow_symlinks=True)


def take_name(source: Path, path: Path, nameless: int | None) -> None:
    """Give a whole file its name. FileExistsError where there is a file of that name, whenever it came."""
    try:
        link(source, path, nameless)
    except OSError as error:
        if error.errno not in NO_LINKS or nameless is not None:
            raise
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # an empty file keeps the name
        os.replace(source, path)


def this_run() -> str | None:
    """What tells this run of torchrun from all others, the same in each of its attempts; None where it restarts no ranks.

    torchrun's own name of a run is "none" unless one is given or made, so the folder of its logs, which is always new, is taken too.
    """
    name, errors = (os.environ.get(f"TORCHELASTIC_{what}", "") for what in ("RUN_ID", "ERROR_FILE"))
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0" or (name in ("", "none") and not errors):
        return None
    logs = Path(errors).parents[2:3]  # LOGS/attempt_0/0/error.json
    return hashlib.sha256(f"{name} {logs and logs[0]}".encode()).hexdigest()[:16]


def save_picture(
    image: Tensor,
    path: Path,
    seed: int,
    settings: dict,
    overwrite: bool = True,
    numbered: bool = False,
    run: str | None = None,
) -> Path:
    """Write (H, W, 3) uint8 in the format that the name says; returns its path.

    Prompt, seed, settings and, if given, the run go with it: as text chunks of a PNG, as EXIF of JPEG and WebP. UsageError where that
    fails. Without `overwrite` NameTaken where the name is no longer free; with `numbered` the next number that is.
    """
    known, picture = picture_format(path), Image.fromarray(image.numpy())
    if known == "PNG":
        info = PngImagePlugin.PngInfo()
        for name, text in metadata_of(seed, settings, run).items():
            info.add_itxt(name, text)
        options = {"pnginfo": info}
    else:
        options = {"exif": exif_of(seed, settings, run), "quality": 95, "subsampling": 0}
    while True:
        try:
            write_whole(path, lambda temporary: picture.save(temporary, format=known, **options), overwrite)
            return path
        except NameTaken:
            if not numbered:
                raise
            path = free_name(PICTURE)
        except UsageError:
            raise
        except ValueError as error:  # what the format cannot hold
            raise UsageError(
                f"{path} could not be written as {known} ({error}): give a name that ends in .png."
            ) from None


def read_text(path: Path) -> dict[str, str]:
    """What `save_picture` wrote into a whole picture of any size, without decoding a PNG; empty where the file is no such picture."""
    try:
        if PICTURES.get(path.suffix.lower(), "PNG") != "PNG":
            with Image.open(path) as picture:
                described = json.loads(picture.getexif()[ExifTags.Base.ImageDescription])
                picture.load()  # to the end of the file
            return {
                name: value if isinstance(value, str) else json.dumps(value)
                for name, value in described.items()
            }
        with PngImagePlugin.PngImageFile(path) as picture:
            metadata = {name: str(value) for name, value in picture.info.items() if isinstance(value, str)}
            picture.verify()  # the checksums, to the end of the file
        return metadata
    except Exception:  # Pillow raises many kinds for a file that is none or is damaged
        return {}
