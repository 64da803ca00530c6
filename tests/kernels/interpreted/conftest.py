"""What the interpreted tests share: both forms of an operation, and lists of tensors of awkward sizes."""

from collections.abc import Callable, Iterator

import pytest
import torch
import triton  # noqa: F401 (without it every test here must fail)
from torch import Tensor

from spectrim.kernels import use

SIZES = [(0,), (1,), (7,), (33, 31), (4097,), (4096,), (3, 40)]


@pytest.fixture(params=[False, True], ids=["eager", "kernel"])
def form(request) -> Iterator[bool]:
    """An operation in each of its forms."""
    with use(request.param):
        yield request.param


@pytest.fixture
def lists() -> Callable[..., list[Tensor]]:
    """Random tensors of awkward sizes."""

    def made(dtype=torch.float32, positive=False, sizes=SIZES) -> list[Tensor]:
        tensors = [torch.randn(size) for size in sizes]
        return [(tensor.abs() if positive else tensor).to(dtype) for tensor in tensors]

    return made
