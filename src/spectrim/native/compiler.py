"""Compiles the C files beside it into a shared library, once for a machine, and finds it again afterwards.

The library lies in the user's cache folder under a name made of everything that decides its code, and is put there
whole, so processes may race. Where that folder cannot be written it is compiled for this process alone.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["NoLibraryError", "built_library"]

SOURCES = Path(__file__).parent
COMPILERS = ("cc", "gcc", "clang")

#: No -ffast-math: infinities, NaN and denormal numbers keep their meaning, and sums their order.
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fPIC",
    "-shared",
)
SECONDS = 120.0  # a compiler that takes longer will not come back


class NoLibraryError(Exception):
    """There is no library here; the message says why."""


def built_library() -> Path:
    """The shared library, compiled now unless it was before.

    Raises:
        NoLibraryError: no compiler, or one that fails.
    """
    compiler = find_compiler()
    sources = sorted(SOURCES.glob("*.c"))
    name = f"kernels-{fingerprint(compiler)}.so"
    for folder in folders():
        library = folder / name
        if library.is_file():
            return library
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(suffix=".so", dir=folder)
        except OSError:
            continue
        os.close(handle)
        try:
            run([compiler, *FLAGS, "-o", temporary, *map(str, sources), "-lm"])
            Path(temporary).replace(library)
        finally:
            Path(temporary).unlink(missing_ok=True)
        return library
    raise NoLibraryError("no folder to put it in can be written to")


def find_compiler() -> str:
    """The system's C compiler: $CC, or the first of the usual names."""
    if platform.system() != "Linux":
        raise NoLibraryError(f"it is for Linux, and this is {platform.system()}")
    for name in (os.environ.get("CC"), *COMPILERS):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise NoLibraryError("no C compiler was found")


def folders() -> Iterator[Path]:
    """Where the library may lie, best first: the cache of this user, or a folder that goes with this process."""
    with suppress(RuntimeError):  # a user without a home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spectrim" / "native"
    with suppress(OSError):
        own = Path(tempfile.mkdtemp(prefix="spectrim-"))
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        yield own


def fingerprint(compiler: str) -> str:
    """A name for the code that this compiler makes of the sources on this processor."""
    content = hashlib.sha256()
    parts = [*FLAGS, run([compiler, "--version"]), platform.machine(), processor()]
    parts += [path.read_text() for path in sorted(SOURCES.glob("*.[ch]"))]
    for part in parts:
        content.update(part.encode() + b"\0")
    return content.hexdigest()[:20]


def processor() -> str:
    """What the processor is and can do: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    kept = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(line for line in lines if line.split(":")[0].strip() in kept)


def run(command: list[str]) -> str:
    """A command's output."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoLibraryError(f"{command[0]}: {error}") from None
    if done.returncode:
        message = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise NoLibraryError(f"{command[0]} failed: {message[0] if message else done.returncode}")
    return done.stdout
