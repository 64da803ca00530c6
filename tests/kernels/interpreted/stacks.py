"""Sums of stacks, norms, and the operators in half precision that are made of them, in both forms, against float64."""

import pytest
import torch

from spectrim.kernels.device.symmetric import product_less
from spectrim.kernels.stacks import clip_scales, combine, frobenius_norms, program_numbers
from spectrim.operators import _stack_product
from spectrim.operators.half import half_clip, half_polar


def stacks(*dtypes):
    """Three stacks: of whole matrices, of matrices that lie in larger ones, and of transposed ones."""
    parts = [torch.randn(2, 5, 7), torch.randn(3, 8, 1000)[:, 2:7], torch.randn(1, 90, 60).mT]
    return [[torch.empty_like(x, dtype=dtype).copy_(torch.randn(x.shape)) for x in parts] for dtype in dtypes]


@pytest.mark.parametrize("second", ["none", "plain", "scaled"])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_sums_with_a_number_for_each_matrix(form, second, precision):
    x, y, out = stacks(torch.float32, torch.float16, torch.float16)
    a, b = torch.randn(6, dtype=precision), torch.randn(6, dtype=precision)
    combine(out, x, a, None if second == "none" else y, b if second == "scaled" else None)
    start = 0
    for i, target in enumerate(out):
        end = start + len(target)
        expected = x[i].double() * a[start:end].double().view(-1, 1, 1)
        if second != "none":
            expected += y[i].double() * (b[start:end].double().view(-1, 1, 1) if second == "scaled" else 1.0)
        torch.testing.assert_close(target.double(), expected, rtol=2e-3, atol=2e-3)
        start = end


def test_a_sum_may_take_the_place_of_its_first_summand(form):
    (x, y), a, b = stacks(torch.float16, torch.float16), torch.full((6,), 2.0), torch.full((6,), -1.0)
    expected = [2 * u.double() - v.double() for u, v in zip(x, y, strict=True)]
    combine(x, x, a, y, b)
    for target, exact in zip(x, expected, strict=True):
        torch.testing.assert_close(target.double(), exact, rtol=2e-3, atol=5e-3)


@pytest.mark.parametrize("size", [1e-40, 1.0, 1e30])
def test_norms_of_all_float32_sizes(form, size):
    (x,) = stacks(torch.float32)
    x = [stack.mul_(size) for stack in x]
    norms = frobenius_norms(x)
    expected = torch.cat([torch.linalg.matrix_norm(stack.double()) for stack in x])
    torch.testing.assert_close(norms, expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("threshold", [1e-30, 2.0, 1e38])
@pytest.mark.parametrize("kind", ["number", "scalar", "vector"])
def test_scales_of_a_clip(form, threshold, kind):
    X = [torch.randn(2, 30, 40) * 1e20, torch.randn(2, 9, 7) * 1e-30, torch.zeros(1, 3, 3)]
    X[0][1] = float("nan")
    c = {"number": threshold, "scalar": torch.tensor(threshold), "vector": torch.full((5,), threshold)}[kind]
    unit, low, most = clip_scales(X, c, size=11.0, most=24.0, least=1e-4)
    norm = torch.cat([torch.linalg.matrix_norm(stack.double()) for stack in X]).clamp_min(1e-60)
    expected = torch.minimum(24 * norm, torch.tensor(threshold, dtype=torch.float64))
    factor = 11.0 / torch.hypot(norm, expected)
    close = {"rtol": 1e-6, "atol": 0.0, "equal_nan": True}
    torch.testing.assert_close(unit, factor, **close)
    torch.testing.assert_close(most, expected.float(), **close)
    torch.testing.assert_close(low, (factor * expected).clamp_min(11.0 * 1e-4).float(), **close)


def test_numbers_from_the_row_that_serves(form):
    X = torch.randn(6, 20, 20).half() * torch.tensor([1e-3, 0.1, 1.0, 1.0, 1.0, 0.0]).half().view(6, 1, 1)
    low = torch.tensor([0.1, 0.5, 1.0, 2.0, 5.0, 1.0])
    table, powers, ends = (
        torch.randn(4, 5),
        torch.tensor([[0.0], [-0.5], [-1.0], [-0.25]]),
        torch.tensor([0.1, 1.0, 5.0, 50.0]),
    )
    found = program_numbers(X, low, table, powers, ends, smallest=1e-7)
    norm = torch.linalg.matrix_norm(X.double()).clamp_min(1e-7)
    rows = torch.bucketize(norm / low.double() ** 4, ends.double())
    assert len(rows.unique()) > 2
    torch.testing.assert_close(found.double(), table.double()[:, rows] * norm ** powers.double(), rtol=1e-4, atol=1e-6)
    assert found.is_contiguous()


@pytest.mark.parametrize("shape", [(128, 256), (150, 70), (256, 128)])
@pytest.mark.parametrize("turned", [False, True])
def test_a_product_less_what_it_is_close_to_is_rounded_once(shape, turned):
    rows, width = shape
    S = torch.randn(2, rows, rows) / rows
    S = ((S + S.mT) / 2).half()
    Y = torch.randn(2, width, rows).half().mT if turned else torch.randn(2, rows, width).half()
    X = torch.empty_like(Y, dtype=torch.float32).copy_(torch.randn(2, rows, width))
    factors = torch.tensor([0.5, 3.0], dtype=torch.float64)
    result = product_less(S, Y, X, factors)
    exact = S.double() @ Y.double() - factors.view(-1, 1, 1) * X.double()
    torch.testing.assert_close(result.double(), exact, rtol=1e-3, atol=1e-4)
    assert result.stride() == Y.stride()


def mixed():
    """Matrices of one small side, of unlike sizes and spectra: what belongs to one must not reach another."""
    g = torch.Generator().manual_seed(0)
    found = []
    for rows, columns in ((70, 100), (100, 70), (70, 70)):
        X = torch.randn(2, rows, columns, generator=g)
        found.append(X * torch.tensor([1e-3, 300.0]).view(2, 1, 1))
    return found


@pytest.fixture
def small(monkeypatch):
    """Kernels for small matrices too."""
    monkeypatch.setattr(_stack_product, "LEAST_SIDE", 1)


def by_svd(X, function):
    U, sigma, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    return (U * function(sigma).unsqueeze(-2)) @ Vh


@pytest.mark.parametrize("thresholds", [(1e-3, 5.0, 1e6), (5.0, 1e6, 1e-3)])
def test_the_clip_of_unlike_matrices(form, small, thresholds):
    results = half_clip(mixed(), list(thresholds))
    for X, c, result in zip(mixed(), thresholds, results, strict=True):
        exact = by_svd(X, lambda sigma, c=c: sigma / (1 + (sigma / c) ** 2).sqrt())
        errors = torch.linalg.matrix_norm(result.double() - exact) / torch.linalg.matrix_norm(exact)
        ratio = torch.linalg.matrix_norm(X.double(), 2) / c
        assert (errors[ratio < 100] < 1e-2).all()
        assert (torch.linalg.matrix_norm(result.double(), 2) <= 1.02 * c).all()


def test_the_polar_factor_of_unlike_matrices(form, small):
    # Of the square ones the least singular values lie where rounding drowns them.
    wide = mixed()[:2]
    for steps, least, most in ((None, 0.99, 1.01), (5, 0.85, 1.15)):
        for X, result in zip(wide, half_polar(wide, steps=steps), strict=True):
            sigma = torch.linalg.svdvals(result.double())
            assert sigma.min() > least
            assert sigma.max() < most
            assert (torch.linalg.matrix_norm(result - by_svd(X, torch.ones_like)) < (most - 1) * 70**0.5).all()
