"""Writes the page of finished comparisons, sweeps and spectra from their folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectrim.lab.errors import LabError
from spectrim.lab.files import parse_json

if TYPE_CHECKING:
    from spectrim.lab.reports.page.html import PagePart
    from spectrim.lab.reports.page.sections import Study

__all__ = ["PAGE", "report"]

PAGE = "report.html"
"""The page's name beside ``summary.md``."""

WRITERS = "compare, sweep and spectrum"


def report(folders: Sequence[Path], out: Path) -> None:
    """Write one page on all of these comparisons, sweeps and spectra.

    Args:
        folders: as ``compare``, ``sweep`` and ``spectrum`` wrote them; ``results.json`` or ``spectrum.json`` is read,
            and the records of the runs' monitors.
        out: a new file, or a page that spectrim wrote.

    Raises:
        LabError: a folder holds no results, or ``out`` is not a page of spectrim.
    """
    from spectrim.lab.reports.page.html import MARK, write_page

    if out.is_dir() or (out.exists() and MARK not in head(out)):
        raise LabError(f"--out {str(out)!r} exists and is no page of spectrim's; choose another name")
    write_page([read_part(folder) for folder in folders], out)


def head(file: Path) -> str:
    """The first characters of a file, which hold the page's head."""
    with file.open(encoding="utf-8", errors="replace") as stream:
        return stream.read(4096)


def read_part(folder: Path) -> "PagePart":
    """The page's part on the results in a folder.

    Raises:
        LabError: it holds no results of a comparison, a sweep or spectra.
    """
    from spectrim.lab.reports.page.sections import Study

    file, spectra = folder / "results.json", folder / "spectrum.json"
    if not file.is_file():
        file = spectra
    if not file.is_file():
        found = "a single run" if (folder / "result.json").is_file() else "nothing of the kind"
        raise LabError(
            f"{str(folder)!r} holds {found}; expected the folder of a finished comparison or sweep, with results.json, "
            f"or of spectra, with spectrum.json"
        )
    summary: Any = parse_json(file.read_bytes(), repr(str(file)))
    parts = ("subjects" if file is spectra else "recipes", "config", "environment")
    if (
        not isinstance(summary, dict)
        or not all(isinstance(summary.get(part), dict) for part in parts)
        or not summary[parts[0]]
    ):
        raise LabError(f"{str(file)!r} is not what {WRITERS} write")
    kind: Any = "spectrum" if file is spectra else "compare" if "seeds" in summary["config"] else "sweep"
    try:
        return part_of(Study(kind=kind, folder=folder, summary=summary))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise LabError(f"{str(file)!r} is not what {WRITERS} write: {error!r}") from error


def part_of(study: "Study") -> "PagePart":
    """The page's part on a study; only the code for its kind is loaded."""
    if study.kind == "spectrum":
        from spectrim.lab.reports.spectra.spectrum_page import spectrum_part as make
    elif study.kind == "sweep":
        from spectrim.lab.reports.page.sweep_page import sweep_part as make
    else:
        from spectrim.lab.reports.page.comparison_page import comparison_part as make
    return make(study)
