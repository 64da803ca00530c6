"""Quote a comparison's table in the README, from the results file that `spectrim compare` wrote.

    python benchmarks/readme.py benchmarks/results/default

The folder holds results.json and loss.svg of the comparison. The README is rewritten between its two markers only.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from spectrim.lab.files import write_text
from spectrim.lab.reports.comparison_report import NOTE, heading, table_rows
from spectrim.lab.reports.words import verdict_rows
from spectrim.lab.tables import markdown_table

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- results: benchmarks/readme.py -->", "<!-- end of results -->"


def main(folder: Path) -> None:
    summary = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    lines = [
        heading(summary) + ".",
        "",
        *markdown_table(table_rows(summary)),
        "",
        NOTE,
        "",
        *markdown_table(verdict_rows(summary)),
        "",
        f"![Validation loss against tokens]({(folder / 'loss.svg').as_posix()})",
    ]
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    write_text(README, "\n".join([before + BEGIN, *lines, END]) + after)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
