"""Atomic writes: a reader sees the old content or the new one, never a part of either. Every failed write is an
``OSError`` that names the file.
"""

import json
import math
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from spectrim.lab.errors import LabError

__all__ = [
    "PARTIAL",
    "checksum",
    "create_text",
    "lock_file",
    "naming",
    "parse_json",
    "read_lines",
    "remove_partial",
    "write_atomically",
    "write_folder_atomically",
    "write_json",
    "write_text",
]

PARTIAL = ".partial"
"""Suffix of files and folders that are being written; a killed process leaves them behind."""

CHUNK = 1 << 24
"""Bytes that a checksum reads at a time."""


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, force it to disk, and rename it into place."""
    with written_beside(path, write) as file:
        file.replace(path)
    sync_directory(path.parent)


def create_text(path: Path, text: str) -> bool:
    """Write text in UTF-8, atomically, unless the file is there; returns True if this call created it."""
    with written_beside(path, lambda file: file.write(text.encode())) as file:
        try:
            path.hardlink_to(file)
        except FileExistsError:
            return False
        except OSError:
            # The file system has no links: create an empty file first, then replace it.
            try:
                path.touch(exist_ok=False)
            except FileExistsError:
                return False
            file.replace(path)
    sync_directory(path.parent)
    return True


@contextmanager
def written_beside(path: Path, write: Callable[[BinaryIO], object]) -> Iterator[Path]:
    """Write a complete temporary file beside ``path`` for the caller to move there; it is removed afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
    try:
        with naming(path), os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; give them the permissions that open() would have.
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def write_folder_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary folder beside ``path``, and rename it to ``path``, replacing what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}{PARTIAL}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with naming(path):
            partial.mkdir()
            write(partial)
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_directory(path.parent)


def remove_partial(folder: Path) -> None:
    """Delete the partial files of killed processes in a folder that no process writes to."""
    for left in folder.glob(f".*{PARTIAL}"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn a failed write into an ``OSError`` that names the final path."""
    try:
        yield
    except Exception as error:
        number = error_number(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def error_number(error: BaseException | None) -> int | None:
    """The system's error number behind an exception, or None. Torch's serialisation wraps the file's error in its own;
    safetensors, written in Rust, puts the number into its message.
    """
    while error is not None:
        if isinstance(error, OSError):
            return error.errno
        if told := re.search(r"\(os error (\d+)\)", str(error)):
            return int(told[1])
        error = error.__context__
    return None


def checksum(file: Path) -> int:
    """The CRC-32 of a file's content."""
    value = 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def lock_file(path: Path, *, wait: bool = False) -> FileLock | None:
    """Lock a file until the lock is released or the process ends; None if another process has it. Where the file system
    has no locks, every call succeeds.
    """
    lock = FileLock(path)
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        return None
    except NotImplementedError:
        pass
    return lock


def sync_directory(path: Path) -> None:
    """Force a folder's entries to disk, so that a rename survives a power cut (where the system allows it)."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8, atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, atomically; numbers that are not finite become null."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def parse_json(content: str | bytes, place: str) -> Any:
    """The value of a JSON text.

    Raises:
        LabError: it is not JSON, or Python cannot hold a value; the message begins with ``place``.
    """
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise LabError(f"{place}: not JSON: {line}column {error.colno}: {error.msg}") from None
    except UnicodeDecodeError:
        raise LabError(f"{place}: not UTF-8 text") from None
    except RecursionError:
        raise LabError(f"{place}: nested too deeply") from None
    except ValueError as error:
        raise LabError(f"{place}: {str(error).partition(';')[0]}") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a JSON Lines file; a last line that a crash cut short is left out.

    Raises:
        LabError: a line is not a JSON object.
    """
    lines = path.read_bytes().split(b"\n")[:-1]
    records = [parse_json(line, f"{str(path)!r}, line {number}") for number, line in enumerate(lines, start=1)]
    if wrong := [number for number, record in enumerate(records, start=1) if not isinstance(record, dict)]:
        raise LabError(f"{str(path)!r}, line {wrong[0]}: expected a JSON object")
    return records


def finite(value: Any) -> Any:
    """The same nested value with every NaN and infinity replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
