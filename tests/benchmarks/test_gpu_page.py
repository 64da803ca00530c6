"""docs/gpu.md: what it says is what the files of results say."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from gpu.page import page  # noqa: E402


def test_the_page_says_what_the_files_say():
    written = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert written == page(), "write it anew: python benchmarks/gpu_page.py --counted"
