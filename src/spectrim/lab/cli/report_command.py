"""``spectrim report``: writes the page of finished comparisons, sweeps and spectra again."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spectrim.lab.errors import LabError
from spectrim.lab.reports.study import PAGE, report

if TYPE_CHECKING:
    pass

__all__ = ["report_command"]


def report_command(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUNS...", help="Folders of finished comparisons, sweeps and spectra.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The page; default: report.html in the folder, if it is one folder.")
    ] = None,
) -> None:
    """Write the page of finished comparisons, sweeps and spectra again, or one page on several."""
    if out is None:
        if len(runs) > 1:
            raise LabError("--out is missing: name the file that is to hold all of them, such as report.html")
        out = runs[0] / PAGE
    report(runs, out)
    print(f"written to {out}", file=sys.stderr)
