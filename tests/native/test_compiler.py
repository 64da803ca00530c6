"""The library is compiled once, found again, and done without where it cannot be had."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spectrim import native
from spectrim.native import compiler
from spectrim.native.compiler import NoLibraryError, built_library

needs_compiler = pytest.mark.skipif(not native.available(), reason=f"no kernels: {native.unavailable_because()}")

ASKS = "from spectrim import native; print(native.available(), native.unavailable_because())"
STEPS = """
import torch, spectrim
X = torch.nn.Parameter(torch.randn(40, 60)); X.grad = torch.randn(40, 60)
optimizer = spectrim.Spectra([X]); optimizer.step(); optimizer.step(); assert X.isfinite().all()
"""
MAPS = """
from pathlib import Path
print(sorted({line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}))
"""


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@needs_compiler
def test_it_is_compiled_once_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = built_library()
    assert library.parent == tmp_path / "spectrim" / "native"
    written = library.stat().st_mtime_ns
    assert built_library() == library
    assert library.stat().st_mtime_ns == written
    assert list(library.parent.iterdir()) == [library]


@needs_compiler
def test_processes_that_race_end_with_one_whole_library(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ThreadPoolExecutor(3) as pool:
        found = set(pool.map(lambda _: built_library(), range(3)))
    assert len(found) == 1
    assert list((tmp_path / "spectrim" / "native").iterdir()) == [found.pop()]


@needs_compiler
def test_a_home_that_cannot_be_written_gets_a_library_for_this_process(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    library = built_library()
    assert library.is_file()
    assert tmp_path not in library.parents


def test_no_compiler_and_a_failing_one_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(NoLibraryError, match="no C compiler"):
        built_library()
    failing = tmp_path / "cc"
    failing.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "cannot do this" >&2; exit 1; }\n')
    failing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(NoLibraryError, match="cannot do this"):
        built_library()
    assert list((tmp_path / "cache").rglob("*.so")) == []


def test_it_can_be_turned_off_and_steps_go_on_without():
    assert run(STEPS + ASKS, SPECTRIM_NATIVE="0") == "False SPECTRIM_NATIVE turns it off"


@needs_compiler
def test_the_threads_are_those_of_the_one_runtime_that_torch_has_loaded():
    # A plain variable of the environment, so that the steps do use threads.
    assert run(STEPS + MAPS, OMP_NUM_THREADS="2").count("omp") == run("import torch" + MAPS).count("omp")


def test_the_sources_are_part_of_the_package():
    names = {path.name for path in Path(compiler.__file__).parent.iterdir()}
    assert {"kernels.h", "tiles.h", "threads.c", "entries.c", "spike.c", "gram.c", "inverse.c"} <= names
