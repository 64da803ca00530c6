"""Makes helpers such as oracle.py importable by every test, under --import-mode=importlib too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
