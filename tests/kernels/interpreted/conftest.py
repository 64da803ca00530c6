"""What the interpreted tests share: both forms of an operation, and lists of tensors of awkward sizes."""

from collections.abc import Callable, Iterator
from types import FunctionType

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor

from spectrim.kernels import use

SIZES = [(0,), (1,), (7,), (33, 31), (4097,), (4096,), (3, 40)]


@pytest.fixture(scope="module")
def launching(request: pytest.FixtureRequest) -> Iterator[dict[str, bool]]:
    """Whether a test launched a kernel in any of its cases. All must: what quietly falls back to its eager form would
    agree with it. A module names the others, where there is nothing to launch, in EAGER."""
    found: dict[str, bool] = {}
    yield found
    assert {test for test, launches in found.items() if not launches} <= getattr(request.module, "EAGER", set())


@pytest.fixture(autouse=True)
def _launches(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, launching: dict[str, bool]
) -> Iterator[None]:
    names: list[str] = []
    launch, patch = GridExecutor.__call__, interpreter._patch_lang
    patched: set[int] = set()

    def counted(executor: GridExecutor, *args: object, **options: object) -> object:
        names.append(executor.fn.__name__)
        patched.clear()
        return launch(executor, *args, **options)

    def once(fn: FunctionType) -> object:
        # The interpreter replaces the language's functions at every call of a function, which takes a third of the
        # time of these tests: once for each module and launch is enough.
        if id(fn.__globals__) in patched:
            return None
        patched.add(id(fn.__globals__))
        return patch(fn)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    monkeypatch.setattr(interpreter, "_patch_lang", once)
    yield
    given = getattr(request.node, "callspec", None)
    if given is None or given.params.get("form", True):
        test = request.node.originalname
        launching[test] = launching.get(test, False) or bool(names)


@pytest.fixture(params=[False, True], ids=["eager", "kernel"])
def form(request: pytest.FixtureRequest) -> Iterator[bool]:
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
