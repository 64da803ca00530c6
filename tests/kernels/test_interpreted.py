"""Runs the kernels in Triton's interpreter, in a process of its own: its variable is read when Triton is imported.

The tests themselves are in ``interpreted``. A Triton that is missing fails them; nothing here is skipped.
"""

import os
import subprocess
import sys
from pathlib import Path

from worlds import PATIENCE

HERE = Path(__file__).parent / "interpreted"
MODULES = [
    "directions.py",
    "updates.py",
    "screening.py",
    "products.py",
    "spike.py",
    "stacks.py",
    "steps.py",
    "operators.py",
]


def test_kernels_agree_with_their_eager_forms_and_formulas():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    options = ["-q", "-p", "no:cacheprovider", "--no-header", "--show-capture=no"]
    command = [sys.executable, "-m", "pytest", *options, *(str(HERE / module) for module in MODULES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
    assert {path.name for path in HERE.glob("*.py")} == {*MODULES, "conftest.py"}
