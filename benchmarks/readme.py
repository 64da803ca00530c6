"""Quote a comparison in the README and in docs/start.md, from the results file that `spectrim compare` wrote.

    python benchmarks/readme.py benchmarks/results/default

The folder holds results.json and loss.svg of the comparison. Both pages are rewritten between their two markers only.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from spectrim.lab.files import write_text
from spectrim.lab.reports.comparison_report import NOTE, heading, table_rows, verdict_rows
from spectrim.lab.tables import markdown_table

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results: benchmarks/readme.py -->", "<!-- end of results -->"


def quote(page: Path, lines: list[str]) -> None:
    """Put lines between the markers of a page."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    write_text(page, "\n".join([before + BEGIN, *lines, END]) + after)


def main(folder: Path) -> None:
    summary = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    title = heading(summary) + "."
    verdicts = list(markdown_table(verdict_rows(summary)))
    picture = "![Validation loss against tokens]"
    quote(ROOT / "README.md", [title, "", *verdicts, "", f"{picture}({(folder / 'loss.svg').as_posix()})"])
    # The site shows what lies in docs/ alone.
    shutil.copyfile(folder / "loss.svg", ROOT / "docs" / "images" / "comparison.svg")
    tables = [*markdown_table(table_rows(summary)), "", NOTE, "", *verdicts]
    quote(ROOT / "docs" / "start.md", [title, "", *tables, "", f"{picture}(images/comparison.svg)"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
