"""The spike followed by the kernel, against the formula in float64 and against the eager path where it steps aside."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
import spectra
from spectrim import native
from spectrim.native.spikes import apply_low_rank, follow_spike
from spectrim.operators import spike as spike_module
from spectrim.operators.spike import LIMITS, follow_and_shape, track_spike

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no kernels: {native.unavailable_because()}")

shapes = st.tuples(st.integers(2, 150), st.integers(2, 150))


def followed(m: int, n: int, k: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix with k spikes, and the basis of the step before, which a little has changed since."""
    sigma = torch.ones(min(m, n), dtype=torch.float64)
    sigma[:k] = torch.linspace(20, 5, k, dtype=torch.float64)
    M = spectra.matrix(m, n, sigma)
    V = track_spike(M + 0.02 * torch.randn(m, n, dtype=torch.float64), None, rank=k, steps=8).V
    return (scale * M).float(), V.float()


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(1, 64), st.sampled_from([1e-8, 1.0, 1e8]))
def test_the_kernel_gives_the_formula_of_the_spike_that_it_found(shape, k, scale):
    k = min(k, *shape)
    M, V = followed(*shape, k, scale)
    found = follow_spike(M, V, LIMITS)
    assert found is not None
    identity = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(found.U.double().mT @ found.U.double(), identity, rtol=0, atol=2e-6)
    assert oracle.relative_error(found.W, M.double().mT @ found.U.double()) < 2e-5
    by_hand = track_spike(M, V)
    assert oracle.relative_error(found.U @ found.W.mT, (by_hand.U @ by_hand.W.mT).double()) < 1e-4
    if found.right is not None:
        expected = oracle.shape_spike(M, found.U, found.V) if k < min(shape) else M.double()
        formed = M.double() + found.U.double() @ found.right.double().mT
        assert oracle.relative_error(formed, expected) < 1e-4
        torch.testing.assert_close(found.norm.double(), torch.linalg.matrix_norm(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", ["zero", "rank one", "huge", "tiny", "lost basis", "nearly all energy"])
def test_where_it_is_not_accurate_the_eager_path_steps_in(case, monkeypatch):
    M, V = followed(60, 90, 4)
    if case == "zero":
        M = torch.zeros_like(M)
    elif case == "rank one":
        M = torch.randn(60, 1) @ torch.randn(1, 90)
    elif case == "huge":
        M = M * 1e25
    elif case == "tiny":
        M = M * 1e-30
    elif case == "lost basis":
        V = V[:, :1].expand(-1, 4).contiguous()
    else:
        M = M * 1e-4 + 20 * torch.randn(60, 1) @ V[:, :1].mT
    mine, basis = follow_and_shape(M[None], V[None])
    monkeypatch.setattr(spike_module, "serves", lambda *tensors: False)
    its, eager_basis = follow_and_shape(M[None], V[None])
    formed, expected = M + mine.U[0] @ mine.right[0].mT, M + its.U[0] @ its.right[0].mT
    assert oracle.relative_error(formed, expected.double()) < 1e-4
    torch.testing.assert_close(mine.norm, its.norm, rtol=1e-4, atol=0)
    if case != "lost basis":
        # Signs of columns are free.
        torch.testing.assert_close(basis.abs(), eager_basis.abs(), rtol=1e-3, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(shapes, st.integers(1, 64))
def test_the_low_rank_update_is_the_formula(shape, k):
    m, n = shape
    X, M, U, right = torch.randn(m, n), torch.randn(m, n), torch.randn(m, k), torch.randn(k, n + 5)[:, :n].mT
    expected = 0.9 * X.double() - 0.3 * (M.double() + U.double() @ right.double().mT)
    apply_low_rank(X, M, U, right, keep=0.9, step=0.3)
    torch.testing.assert_close(X.double(), expected, rtol=1e-5, atol=1e-4)


def test_results_do_not_depend_on_the_number_of_threads():
    M, V = followed(700, 130, 9)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            found.append(follow_spike(M, V, LIMITS))
    finally:
        torch.set_num_threads(threads)
    for one, other in ((found[0], found[1]), (found[0], found[2])):
        assert all(torch.equal(mine, its) for mine, its in zip(one, other, strict=True))
