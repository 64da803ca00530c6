"""``spectrim report``: the page of finished comparisons and sweeps, from their folders."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectrim.lab.errors import LabError

if TYPE_CHECKING:
    from spectrim.lab.page_sections import Study

__all__ = ["PAGE", "report", "report_command"]

PAGE = "report.html"
"""The page's name beside ``summary.md``."""


def report(folders: Sequence[Path], out: Path) -> None:
    """Write one page on all of these comparisons and sweeps.

    Args:
        folders: as ``compare`` and ``sweep`` wrote them; ``results.json`` is read, and the runs for their plan.
        out: a new file, or a page that spectrim wrote.

    Raises:
        LabError: a folder holds no results, or ``out`` is somebody's file.
    """
    from spectrim.lab.page import MARK, write_page
    from spectrim.lab.page_sections import part_of

    if out.is_dir() or (out.exists() and MARK not in head(out)):
        raise LabError(f"--out {str(out)!r} exists and is no page of spectrim's; choose another name")
    parts = []
    for study in map(read_study, folders):
        try:
            parts.append(part_of(study))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise LabError(
                f"{str(study.folder / 'results.json')!r} is not what compare and sweep write: {error!r}"
            ) from error
    write_page(parts, out)


def head(file: Path) -> str:
    """The first characters of a file, which hold the page's head."""
    with file.open(encoding="utf-8", errors="replace") as stream:
        return stream.read(4096)


def read_study(folder: Path) -> "Study":
    """What a folder holds.

    Raises:
        LabError: it holds no results of a comparison or sweep.
    """
    from spectrim.lab.page_sections import Study

    file = folder / "results.json"
    if not file.is_file():
        kind = "a single run" if (folder / "result.json").is_file() else "nothing of the kind"
        raise LabError(
            f"{str(folder)!r} holds {kind}; expected the folder of a finished comparison or sweep, with results.json"
        )
    try:
        summary: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LabError(f"{str(file)!r} is not JSON: {error}") from None
    parts = [summary.get(key) for key in ("recipes", "config", "environment")] if isinstance(summary, dict) else [None]
    if not all(isinstance(part, dict) for part in parts) or not summary["recipes"]:
        raise LabError(f"{str(file)!r} is not what compare and sweep write")
    return Study(
        kind="compare" if "seeds" in summary["config"] else "sweep",
        name=folder.resolve().name,
        folder=folder,
        summary=summary,
    )


def report_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUNS...", help="Folders of finished comparisons and sweeps.")],
    out: Annotated[
        Path | None, typer.Option(help="The page; default: report.html in the folder, if it is one folder.")
    ] = None,
) -> None:
    """Write the page of finished comparisons and sweeps again, or one page on several."""
    if out is None:
        if len(runs) > 1:
            raise LabError("--out is missing: name the file that is to hold all of them, such as report.html")
        out = runs[0] / PAGE
    report(runs, out)
    print(f"written to {out}", file=sys.stderr)
