"""Writes docs/gpu.md: counts a step of every optimizer on fake CUDA tensors, and quotes what was measured.

python benchmarks/gpu_page.py             # count, in a minute or two, and write
python benchmarks/gpu_page.py --counted   # write from the counts of last time
"""

from __future__ import annotations

import argparse

from gpu.page import PAGE, write_page
from gpu.predicted import PREDICTED, predict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counted", action="store_true", help=f"take the counts of {PREDICTED.name} as they are")
    arguments = parser.parse_args()
    if not arguments.counted:
        predict()
    write_page()
    print(f"page in {PAGE}")


if __name__ == "__main__":
    main()
