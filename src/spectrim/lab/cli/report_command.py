"""``spectrim report``: writes the page of finished comparisons, sweeps and spectra again."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from spectrim.lab.cli.shared_options import FILES
from spectrim.lab.errors import LabError

__all__ = ["report_command"]


def report_command(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUNS...", help="Folders of finished comparisons, sweeps and spectra.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The page. [dim]\\[default: report.html in the folder, if it is one folder][/dim]",
            rich_help_panel=FILES,
        ),
    ] = None,
) -> None:
    """Write the page of finished comparisons, sweeps and spectra again, or one page on several."""
    from spectrim.lab.reports.study import PAGE, report

    if out is None:
        if len(runs) > 1:
            raise LabError("--out is missing: name the file that is to hold all of them, such as report.html")
        out = runs[0] / PAGE
    report(runs, out)
    print(f"written to {out}", file=sys.stderr)
