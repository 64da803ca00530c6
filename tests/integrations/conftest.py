"""Frameworks keep ranks and settings in the environment; what one leaves there is not for the next."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def environment_as_before() -> Iterator[None]:
    """The environment that a test finds is the one that the test before it found."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ |= before
