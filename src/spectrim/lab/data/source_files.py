"""Finds the files of a source: the file itself, those in a folder, or those that match a glob.

Only files whose names say that they hold no text are skipped silently; a folder that cannot be read is an error. Relied
on by :mod:`spectrim.lab.data.sources` and by the cache of tokens.
"""

from pathlib import Path

from spectrim.lab.errors import LabError
from spectrim.lab.paths import is_wild, matches, walk

__all__ = ["ROW_SUFFIXES", "TEXT_SUFFIXES", "find_files", "suffix"]

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst")
ROW_SUFFIXES = (".jsonl", ".ndjson", ".parquet")
"""Suffixes of text files that folders are searched for, also with .gz; a file that is named itself may have any
suffix."""


def find_files(location: str) -> list[Path]:
    """The file, the files in the folder, or those that match the glob, sorted.

    Raises:
        LabError: there are none, or a folder on the way to them cannot be read.
    """
    path = Path(location)
    try:
        if path.is_file():
            return [path]
        if path.is_dir():
            known = TEXT_SUFFIXES + ROW_SUFFIXES
            found = sorted(file for file in walk(path) if suffix(file) in known and file.is_file())
            if not found:
                raise LabError(f"data {location!r}: the folder holds no text files ({', '.join(known)}, also with .gz)")
            return found
        if path.exists():
            raise LabError(f"data {location!r} is neither a file nor a folder")
        found = sorted(file for file in matches(path) if file.is_file()) if any(map(is_wild, path.parts)) else []
    except OSError as error:
        raise LabError(f"data {str(error.filename or location)!r}: {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, LabError):
            raise
        raise LabError(f"data {location!r}: {error}") from None
    if not found:
        raise LabError(
            f"data {location!r}: no such file, and no folder or glob that matches one "
            f"(a data set of the hub is named hub:OWNER/NAME)"
        )
    return found


def suffix(path: Path) -> str:
    """A file's suffix, without .gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix
