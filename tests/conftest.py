"""Makes helpers such as oracle.py importable by every test, under --import-mode=importlib too, and seeds every test."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in a test whatever ran before it."""
    torch.manual_seed(0)
