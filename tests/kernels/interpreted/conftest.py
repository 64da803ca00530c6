"""What the interpreted tests share: both forms of an operation, and lists of tensors of awkward sizes."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

from spectrim.kernels import use

SIZES = [(0,), (1,), (7,), (33, 31), (4097,), (4096,), (3, 40)]


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels that a test launches, which are some: a form that quietly falls back to eager must fail."""
    names: list[str] = []
    launch = GridExecutor.__call__

    def named(executor: GridExecutor, *args: object, **options: object) -> object:
        names.append(executor.fn.__name__)
        return launch(executor, *args, **options)

    monkeypatch.setattr(GridExecutor, "__call__", named)
    yield names
    assert names, "no kernel was launched"


@pytest.fixture(params=[False, True], ids=["eager", "kernel"])
def form(request: pytest.FixtureRequest, launches: list[str]) -> Iterator[bool]:
    """An operation in each of its forms."""
    with use(request.param):
        yield request.param
    assert bool(launches) == request.param
    launches.append("counted")


@pytest.fixture
def lists() -> Callable[..., list[Tensor]]:
    """Random tensors of awkward sizes."""

    def made(dtype=torch.float32, positive=False, sizes=SIZES) -> list[Tensor]:
        tensors = [torch.randn(size) for size in sizes]
        return [(tensor.abs() if positive else tensor).to(dtype) for tensor in tensors]

    return made
