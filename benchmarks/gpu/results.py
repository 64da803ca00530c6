"""What was measured, written whole after every section; a section or a row that fails says so, and the rest goes on."""

from __future__ import annotations

import json
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch

from gpu.device import Device, OutOfTimeError, first_line
from spectrim.lab.files import write_json

__all__ = ["FAILED", "FOLDER", "MEASURED", "TRAINED", "Results", "Row", "provenance", "rows"]

Row = dict[str, Any]
FOLDER = Path(__file__).parent.parent / "results"
MEASURED, TRAINED = FOLDER / "cuda.json", FOLDER / "cuda-training.json"
FAILED = "failed"
"""The key under which a row or a section says why there is none."""


class Results:
    """Sections of rows, in a file.

    Args:
        path: the JSON file.
        about: where and how it is measured.
        say: told of every row and section as they come.
    """

    def __init__(self, path: Path, about: Row, say: Callable[[str], object] = print) -> None:
        self.path, self.say = path, say
        self.content: Row = {"provenance": about, "sections": self.kept(about)}

    def kept(self, about: Row) -> Row:
        """Sections that were measured before with the same code on the same device."""
        before = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        same = all(before.get("provenance", {}).get(key) == about[key] for key in ("device", "torch", "commit"))
        sections: Row = before["sections"] if same else {}
        return sections

    def section(self, name: str, device: Device, measure: Callable[[Device], Iterable[Row]]) -> bool:
        """Measure a section and write the file; whether all could be measured, and held."""
        self.say(f"== {name}")
        began, found = time.monotonic(), []
        section: Row = {"rows": found}
        try:
            with device.clean():
                for row in measure(device):
                    found.append(row)
                    self.say("  ".join(f"{key}: {shown(value)}" for key, value in row.items()))
        except Exception as error:
            section[FAILED] = first_line(error)
            self.say(f"FAILED {name}: {section[FAILED]}\n{traceback.format_exc(limit=-4)}")
        section["seconds"] = round(time.monotonic() - began, 1)
        self.content["sections"][name] = section
        write_json(self.path, self.content)
        return FAILED not in section and not any(FAILED in row or row.get("holds") is False for row in found)


def rows(device: Device, cases: Iterable[tuple[Row, Callable[[], Row]]]) -> Iterator[Row]:
    """A row for every case: what names it, and what its function finds, or why it failed."""
    for names, measure in cases:
        try:
            device.check_time()
            with device.clean():
                found = measure()
        except OutOfTimeError as error:
            found = {FAILED: str(error)}
        except Exception as error:
            found = {FAILED: first_line(error)}
        yield {**names, **found}


def provenance(device: Device) -> Row:
    """Where numbers come from."""
    about: Row = {"date": date.today().isoformat(), "torch": torch.__version__, "commit": commit()}
    about["device"] = torch.cuda.get_device_name(device.torch) if device.cuda else "CPU"
    if device.cuda:
        about["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device.torch)))
        about["cuda"] = torch.version.cuda or torch.version.hip
    about["triton"] = getattr(__import__("triton"), "__version__", None) if installed("triton") else None
    about["threads"] = torch.get_num_threads()
    about["rehearsal"] = device.small or not device.cuda
    return about


def installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def commit() -> str | None:
    """The commit of this checkout, with a plus where files differ from it; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
