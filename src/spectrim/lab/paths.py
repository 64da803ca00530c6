"""Makes users' paths absolute, and reports invalid ones in one line."""

import errno
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from spectrim.lab.errors import LabError
from spectrim.lab.settings import is_text

__all__ = ["is_wild", "matches", "named_path", "walk"]


def named_path(text: str, what: str) -> Path:
    """The absolute path that a user means.

    Args:
        text: as it was given; ``~`` is the user's home.
        what: begins an error message, such as ``data 'x.txt'``.

    Raises:
        LabError: it is empty, invalid on this system, or in a folder that this user may not read.
    """
    if not text.strip():
        raise LabError(f"{what}: an empty name, expected a path")
    if not is_text(text):
        raise LabError(f"{what}: the name is not UTF-8 and could not be written down; rename it")
    try:
        path = Path(text).expanduser().absolute()
        is_folder = path.is_dir()
    except RuntimeError:
        raise LabError(f"{what}: there is no user of that name") from None
    except OSError as error:
        raise LabError(f"{what}: {error.strerror}") from None
    except ValueError as error:
        raise LabError(f"{what}: {error}") from None
    if is_folder and not os.access(path, os.R_OK | os.X_OK):
        raise LabError(f"{what}: {os.strerror(errno.EACCES)}")
    return path


def walk(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder without following links to folders.

    Raises:
        OSError: one of the folders cannot be read.
    """
    for place, _, files in os.walk(folder, onerror=fail):
        yield from (Path(place) / file for file in files)


def matches(pattern: Path) -> Iterator[Path]:
    """Yield the matches of an absolute pattern; ``**`` is any number of folders, and links to folders are not followed.

    Unlike ``Path.glob`` it does not pass over folders that cannot be read.

    Raises:
        OSError: one of the folders cannot be read.
        ValueError: a part has ``**`` and other characters.
    """
    for part in pattern.parts:
        if "**" in part and part != "**":
            raise ValueError(f"'**' is any number of folders and stands alone, as in **/{part.replace('**', '*')}")
    anchor, *parts = pattern.parts
    found: dict[Path, None] = dict.fromkeys(expand(Path(anchor), parts))
    yield from found


def expand(base: Path, parts: list[str]) -> Iterator[Path]:
    if not parts:
        yield base
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        for place, _, files in os.walk(base, onerror=fail):
            yield from expand(Path(place), rest)
            if not rest:
                yield from (Path(place) / file for file in files)
    elif not is_wild(part):
        if (base / part).exists():
            yield from expand(base / part, rest)
    elif base.is_dir():
        for entry in sorted(os.scandir(base), key=lambda entry: entry.name):
            if fnmatchcase(entry.name, part) and (not rest or entry.is_dir()):
                yield from expand(base / entry.name, rest)


def is_wild(part: str) -> bool:
    """True if a part of a path is a pattern."""
    return not {"*", "?", "["}.isdisjoint(part)


def fail(error: OSError) -> None:
    raise error
