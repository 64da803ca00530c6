"""Show a run of `spectrim claims` on the site: docs/results.md, from the folder that the command wrote.

    python benchmarks/claims.py benchmarks/results/claims-quick

The folder holds results.json, results.md and effects.svg.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from spectrim.lab.files import write_text

ROOT = Path(__file__).parent.parent


def main(folder: Path) -> None:
    page = (folder / "results.md").read_text(encoding="utf-8")
    shutil.copyfile(folder / "effects.svg", ROOT / "docs" / "images" / "claims.svg")
    note = "[How claims are judged, and how to repeat this on your machine](claims.md)."
    head, rest = page.split("\n\n", 1)
    write_text(
        ROOT / "docs" / "results.md", f"{head}\n\n{note}\n\n{rest}".replace("(effects.svg)", "(images/claims.svg)")
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
