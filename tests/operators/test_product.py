"""Products by whichever library is faster: they are products, whatever lies how in memory."""

import itertools

import pytest
import torch

from spectrim.operators import _product
from spectrim.operators._product import product


def lay_out(X, how):
    """The same matrices by rows, by columns, or as a part of larger ones."""
    if how == "rows":
        return X
    if how == "columns":
        return X.mT.contiguous().mT
    larger = torch.zeros(*X.shape[:-2], X.shape[-2] + 3, X.shape[-1] + 5)
    larger[..., 3:, 5:] = X
    return larger[..., 3:, 5:]


@pytest.mark.parametrize("layouts", list(itertools.product(["rows", "columns", "part"], repeat=2)))
@pytest.mark.parametrize("shape", [(90, 80, 70), (300, 200, 12), (12, 300, 200), (2, 3, 4)])
@pytest.mark.parametrize("stack", [(), (1,), (3,), (2, 2)])
def test_a_product_is_a_product_however_its_factors_lie_in_memory(layouts, shape, stack):
    m, k, n = shape
    A, B = torch.randn(*stack, m, k), torch.randn(*stack, k, n)
    expected = (A.double() @ B.double()).float()
    torch.testing.assert_close(product(lay_out(A, layouts[0]), lay_out(B, layouts[1])), expected, rtol=1e-4, atol=1e-4)


def test_a_product_has_a_derivative_where_one_is_asked_for():
    A, B = torch.randn(90, 80, requires_grad=True), torch.randn(80, 70)
    product(A, B).sum().backward()
    torch.testing.assert_close(A.grad, B.sum(1).expand(90, 80))


def test_a_compiler_sees_an_ordinary_product():
    A, B = torch.randn(90, 80), torch.randn(80, 70)
    compiled = torch.compile(product, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(A, B), A @ B)


def test_the_library_takes_large_products_of_float32_without_derivatives_and_no_others(monkeypatch):
    taken = []

    def linear(A, B, *_):
        taken.append((A.shape, B.shape))
        return A @ B.mT

    monkeypatch.setattr(_product, "_linear", linear)
    A, B = torch.randn(90, 80), torch.randn(80, 70)
    product(A, B)
    assert len(taken) == 1
    product(torch.stack([A, A]), torch.stack([B, B]))
    assert len(taken) == 3
    taken.clear()
    product(A[:, :2], B[:2])
    product(A.double(), B.double())
    product(A, B.clone().requires_grad_())
    product(A.expand(2, -1, -1), B)
    assert taken == []
    with torch.no_grad():
        product(A, B.clone().requires_grad_())
    monkeypatch.setattr(_product, "_linear", None)
    torch.testing.assert_close(product(A, B), A @ B)
    assert len(taken) == 1
