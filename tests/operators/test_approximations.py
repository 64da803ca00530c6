"""The functions behind the fast solvers: each approximates what it says, and no other does better."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
import spectra
from spectrim.operators import hard_clip, orthogonalize, soft_clip
from spectrim.operators._symmetric import Embedding, add_resolvents_, gram_matrix, mirror_
from spectrim.operators.minimax import minimax_quintic, schedule
from spectrim.operators.rational import add_far_resolvent_, largest_eigenvalue, spike_basis, zolotarev


@pytest.mark.parametrize("poles", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("kappa", [1.01, 3.0, 1e2, 1e4, 1e8])
def test_the_rational_function_equioscillates_with_the_error_it_states(kappa, poles):
    scale, weights, shifts, error = zolotarev(kappa, poles)
    x = torch.logspace(0, torch.tensor(kappa).log10().item(), 50001, dtype=torch.float64)
    value = scale * (1 + sum(a / (x + p) for a, p in zip(weights, shifts, strict=True)))
    deviation = value * x.sqrt() - 1
    assert min(weights) > 0
    assert min(shifts) > 0
    assert deviation.abs().max().item() == pytest.approx(error, rel=1e-3, abs=1e-13)
    if error > 1e-9:  # 2r + 2 extremes of alternating sign: by Chebyshev's criterion none is better
        extremes = deviation[deviation.abs() > 0.999 * error].sign()
        changes = (extremes[1:] != extremes[:-1]).sum().item()
        assert changes >= 2 * poles + 1


@pytest.mark.parametrize("low", [1e-4, 1e-2, 0.1, 0.5, 0.8])
def test_the_quintic_equioscillates_on_its_interval(low):
    a, b, c, lowest = minimax_quintic(low)
    x = torch.linspace(low, 1, 200001, dtype=torch.float64)
    p = a * x + b * x**3 + c * x**5
    assert p.max().item() == pytest.approx(1.0, abs=1e-6)
    assert p.min().item() == pytest.approx(lowest, rel=1e-5)
    middle = (1 + lowest) / 2
    extremes = (p - middle)[(p - middle).abs() > 0.9999 * (1 - middle)].sign()
    assert (extremes[1:] != extremes[:-1]).sum().item() >= 3


def test_more_is_needed_for_a_longer_interval():
    counts = [len(schedule(low, 1e-3)) for low in (0.9, 0.5, 0.1, 1e-2, 1e-3, 1e-4)]
    assert counts == sorted(counts)
    assert counts[-2] <= 7


@pytest.mark.parametrize("m", [1, 20, 65, 100, 256, 400])
@pytest.mark.parametrize("ratio", [30.0, 300.0, 1e3])
def test_the_steps_suffice_where_the_bound_on_the_norm_is_at_its_loosest(m, ratio):
    X = torch.eye(m)
    expected = 1 / (1 + ratio**2) ** 0.5
    torch.testing.assert_close(soft_clip(X, 1 / ratio, solver="minimax"), X * expected, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("ratio", [1e3, 1e5, 1e8])
def test_a_bound_on_the_norm_that_is_tight_does_not_let_rounding_blow_up(ratio):
    X = spectra.matrix(300, 400, spectra.one_spike(300)).float()
    clipped = soft_clip(X, 1 / ratio, solver="minimax")
    assert torch.linalg.matrix_norm(clipped, ord=2) <= (1 + 1e-3) / ratio


@pytest.mark.parametrize("m", [1, 10, 130, 600])
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("embedded", [False, True])
def test_the_gram_matrix_is_a_product_and_an_embedding_folds_back(m, by_columns, embedded):
    X = torch.randn(150, m, dtype=torch.float64).mT if by_columns else torch.randn(m, 150, dtype=torch.float64)
    if not embedded:
        torch.testing.assert_close(gram_matrix(X, 3.0), X @ X.mT / 9)
        return
    Q = Embedding(torch.linalg.qr(torch.randn(m, min(m, 7), dtype=torch.float64)).Q)
    gram = gram_matrix(X, 3.0, Q)
    apart = Q.apply(X)
    torch.testing.assert_close(gram, apart @ apart.mT / 9)
    torch.testing.assert_close(Q.fold(gram), X @ X.mT / 9)
    torch.testing.assert_close(torch.linalg.svdvals(apart)[: min(m, 150)], torch.linalg.svdvals(X))


@pytest.mark.parametrize("n", [1, 127, 321])
def test_resolvents_are_weighted_inverses_also_of_a_graded_matrix(n):
    grade = torch.logspace(3, 0, n, dtype=torch.float64)[:, None]
    X = grade * torch.randn(n, 2 * n, dtype=torch.float64)
    gram, root = X @ X.mT, torch.zeros(n, n, dtype=torch.float64)
    weights, shifts = [0.5, 2.0], [3.0, 100.0]
    first = add_resolvents_(root, gram, weights, shifts)
    eye = torch.eye(n, dtype=torch.float64)
    expected = sum(w * torch.linalg.inv(gram + s * eye) for w, s in zip(weights, shifts, strict=True))
    torch.testing.assert_close(mirror_(root.clone()), expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(first, torch.linalg.inv(gram + 3.0 * eye), rtol=1e-8, atol=1e-10)


def test_no_resolvent_is_made_of_a_matrix_that_is_not_positive_definite():
    assert add_resolvents_(torch.zeros(3, 3), -torch.eye(3) * 5, [1.0], [1.0]) is None


def test_the_basis_of_a_spike_takes_it_out():
    X = spectra.matrix(90, 120, torch.cat([torch.linspace(1e3, 1e2, 10), torch.linspace(1, 0, 80)]))
    Q = spike_basis(X, 1.0, 16)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(16, dtype=Q.dtype))
    assert torch.linalg.matrix_norm(X - Q @ (Q.mT @ X), ord=2) < 2.0


@pytest.mark.parametrize("spectrum", spectra.SPECTRA)
def test_the_estimate_of_the_largest_eigenvalue_is_little_below_it(spectrum):
    X = spectra.with_spectrum(spectrum, 200, 300)
    assert 0.8 < largest_eigenvalue(X @ X.mT) <= 1 + 1e-9


def test_a_far_resolvent_is_one_to_within_the_error_of_the_line():
    sigma = torch.cat([torch.linspace(50, 20, 8), torch.linspace(3, 0, 92)])
    X = spectra.matrix(100, 120, sigma)
    Q = torch.linalg.svd(X).U
    gram = Q.mT @ X @ X.mT @ Q
    tail = torch.linalg.eigvalsh(gram[16:, 16:])[-1].item()
    for shift, weight in ((1e3, 1.0), (5e3, 3.0)):
        exact = weight * torch.linalg.inv(gram + shift * torch.eye(100, dtype=torch.float64))
        found = add_far_resolvent_(torch.zeros_like(gram), gram, weight, shift, tail, 16)
        line = weight * (1 / shift**0.5 - 1 / (shift + tail) ** 0.5) ** 2 / 2
        assert torch.linalg.matrix_norm(found - exact, ord=2) <= 1.01 * line


# -- Nasty spectra -----------------------------------------------------------------------------------------------------


@st.composite
def spiky(draw):
    """A few large values over a small bulk, of any scale: what gradients and updates are like at their worst."""
    m, n = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    k = min(m, n)
    spikes = draw(st.integers(0, min(k, 20)))
    height, bulk = 10 ** draw(st.floats(0, 7)), 10 ** draw(st.floats(-7, 0.5))
    sigma = bulk * torch.rand(k, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
    sigma[:spikes] = torch.linspace(height, height / 10, spikes) if spikes else sigma[:spikes]
    X = spectra.matrix(m, n, sigma.double(), draw(st.integers(0, 999)))
    return (X * 10 ** draw(st.floats(-15, 15))).float()


@given(spiky(), st.floats(-7, 7))
@settings(max_examples=150, deadline=None)
def test_a_clip_is_finite_within_its_bound_and_accurate_whatever_the_spectrum(X, exponent):
    largest = torch.linalg.matrix_norm(X.double(), ord=2).item()
    c = max(largest * 10**exponent, 1e-37)
    for clip, expected in ((soft_clip, oracle.soft_clip), (hard_clip, oracle.hard_clip)):
        found = clip(X, c).double()
        assert found.isfinite().all()
        assert torch.linalg.matrix_norm(found, ord=2) <= c * (1 + 1e-5)
        if largest / c <= 1e4:
            assert oracle.relative_error(found, expected(X.double(), c)) < 1e-3


@given(spiky())
@settings(max_examples=60, deadline=None)
def test_a_polar_factor_is_finite_and_within_its_bound_whatever_the_spectrum(X):
    found = orthogonalize(X).double()
    assert found.isfinite().all()
    assert torch.linalg.matrix_norm(found, ord=2) <= 1 + 1e-4


@pytest.mark.parametrize(("side", "c"), [(65, 1e-3), (96, 1e-2), (128, 1e-2)])
def test_a_matrix_of_ones_is_clipped_to_its_threshold(side, c):
    found = soft_clip(torch.ones(side, side), c)
    torch.testing.assert_close(found, torch.full((side, side), c / side), rtol=1e-3, atol=0)
