"""The functions behind the fast solvers: each approximates what it says, and no other does better."""

import pytest
import torch

import oracle
import spectra
from spectrim.operators import orthogonalize, soft_clip
from spectrim.operators._symmetric import Embedding, add_resolvent_, gram_matrix, inverse, inverse_by_halves_
from spectrim.operators.minimax import REACH, minimax_quintic, schedule, stages
from spectrim.operators.rational import (
    POWER_MARGIN,
    add_far_resolvent_,
    eigenvalue_bound,
    fit,
    inverse_root,
    largest_eigenvalue,
    polar_root,
    spike_basis,
    zolotarev,
)


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


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("tol", [4e-4, 1e-8])
@pytest.mark.parametrize("kappa", [1.01, 3.0, 1e2, 1e3, 1e4, 1e5, 1e8])
def test_a_fit_keeps_the_error_it_states_and_with_a_quintic_nothing_is_too_large(kappa, tol, refine):
    found = fit(kappa, tol, refine=refine)
    x = torch.logspace(0, torch.tensor(kappa).log10().item(), 50001, dtype=torch.float64).clamp(max=kappa) - 1
    value = found.scale + sum(w / (x + s) for w, s in zip(found.weights, found.shifts, strict=True))
    value = value * (1 + x).sqrt()
    assert found.error <= tol
    if found.quintic is None:
        assert (value - 1).abs().max() <= found.error * 1.01
    else:
        assert len(found.shifts) < len(fit(kappa, tol, refine=False).shifts)
        a, b, c, _ = found.quintic
        value = a * value + b * value**3 + c * value**5
        assert 1 - 2.01 * found.error - 1e-13 <= value.min() <= value.max() <= 1 + 1e-10


@pytest.mark.parametrize("spectrum", spectra.SPECTRA)
@pytest.mark.parametrize("ratio", [0.5, 5.0, 40.0])
def test_an_inverse_root_is_one_and_nowhere_too_large(spectrum, ratio):
    X = ratio * spectra.with_spectrum(spectrum, 130, 190)
    gram = (X @ X.mT).float()
    allowed = 2e-4 if spectrum == "flat" else 2e-3  # by so much float32 may be off at σ₁/c = 40
    root = inverse_root(gram, 1e-3, allowed)
    sigma, U = torch.linalg.eigh(X @ X.mT)
    quarter = (1 + sigma.clamp_min(0)).pow(0.25)
    values = torch.linalg.eigvalsh(quarter[:, None] * (U.mT @ root.double() @ U) * quarter)
    assert values.max() <= 1 + 1e-6
    assert values.min() >= 1 - 1e-3 - allowed


def test_rounding_that_would_show_leaves_no_root():
    X = 1e3 * spectra.matrix(130, 190, spectra.one_spike(130))
    assert inverse_root((X @ X.mT).float(), 1e-3, 2e-4) is None
    assert inverse_root(X @ X.mT, 1e-3, 2e-4) is not None


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("lowest", [0.3, 1.0])
def test_the_polar_factor_of_a_well_conditioned_matrix_takes_float32(scale, lowest):
    X = scale * spectra.matrix(130, 190, torch.linspace(1, lowest, 130))
    root = polar_root(X @ X.mT)
    assert root.dtype == torch.float32
    assert oracle.relative_error(root.double() @ X, oracle.polar(X)) < 1e-5
    assert oracle.norm(root.double() @ X) <= 1 + 1e-6


@pytest.mark.parametrize("lowest", [0.0, 1e-9, 1e-3, 1e-2, 0.05])
@pytest.mark.parametrize("few", [1, 3, 100])
def test_no_small_singular_value_passes_for_a_well_conditioned_matrix(lowest, few):
    sigma = torch.ones(130, dtype=torch.float64)
    sigma[-few:] = lowest
    X = spectra.matrix(130, 190, sigma)
    assert polar_root(X @ X.mT) is None
    assert oracle.relative_error(orthogonalize(X.float(), solver="reference"), oracle.polar(X.float())) < 1e-5


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-35, 1e35])
def test_what_float32_cannot_hold_the_inverse_of_is_left_to_float64(scale):
    X = spectra.matrix(70, 70, torch.linspace(1, 0.5, 70)) * scale
    assert polar_root(X @ X.mT) is None


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


@pytest.mark.parametrize(("low", "steps"), [(0.9999, 0), (0.5, 2), (0.1, 3), (1e-2, 5), (1e-3, 7), (1e-4, 8)])
def test_a_schedule_sends_its_interval_close_to_one_and_nothing_above_it(low, steps):
    quintics = schedule(low, 5e-4)
    assert len(quintics) == steps
    x = torch.logspace(torch.tensor(low).log10().item(), 0, 100001, dtype=torch.float64)
    below = torch.linspace(0, low, 1001, dtype=torch.float64)
    for a, b, c, least in quintics:
        x, below = (a * y + b * y**3 + c * y**5 for y in (x, below))
        assert x.min() >= least * (1 - 1e-6)
    assert x.min() >= 1 - 5e-4 - 1e-6
    assert max(x.max(), below.max()) <= 1 + 1e-12


@pytest.mark.parametrize("m", [1, 768, 2**13, 2**14, 2**20])
def test_the_groups_reach_as_far_as_they_say_for_every_side(m):
    for tol in (1e-3, 1e-9):
        x = torch.tensor([1 / (REACH * m**0.125)], dtype=torch.float64)
        for steps in stages(m, tol):
            assert 1 <= len(steps) <= 3
            for a, b, c, _ in steps:
                x = a * x + b * x**3 + c * x**5
        assert 1 - tol / 2 <= x <= 1


@pytest.mark.parametrize("m", [1, 20, 65, 100, 256, 400])
@pytest.mark.parametrize("ratio", [30.0, 300.0, 1e3])
def test_the_steps_suffice_where_the_bound_on_the_norm_is_at_its_loosest(m, ratio):
    X = torch.eye(m)
    expected = 1 / (1 + ratio**2) ** 0.5
    torch.testing.assert_close(soft_clip(X, 1 / ratio, solver="minimax"), X * expected, rtol=6e-4, atol=1e-12)


@pytest.mark.parametrize("ratio", [1e3, 1e5, 1e8])
def test_a_bound_on_the_norm_that_is_tight_does_not_let_rounding_blow_up(ratio):
    X = spectra.matrix(300, 400, spectra.one_spike(300)).float()
    clipped = soft_clip(X, 1 / ratio, solver="minimax")
    assert torch.linalg.matrix_norm(clipped, ord=2) <= (1 + 1e-3) / ratio


@pytest.mark.parametrize("n", [1, 5, 257, 400])
def test_inverses_are_inverses_also_of_a_graded_matrix(n):
    A = spectra.matrix(n, n, spectra.ten_spikes(n))
    A = torch.eye(n, dtype=torch.float64) + 1e3 * A @ A.mT
    expected = torch.linalg.inv(A)
    torch.testing.assert_close(inverse(A), expected)
    for leaf in (3, 256):
        halved = A.clone()
        assert inverse_by_halves_(halved, leaf) is halved
        torch.testing.assert_close(halved, expected)


def test_what_is_not_positive_definite_has_no_inverse():
    A = torch.eye(6)
    A[4, 4] = -1
    assert inverse(A) is None
    assert inverse_by_halves_(A.clone(), leaf=2) is None
    assert add_resolvent_(torch.eye(6), A, 1.0, 0.5, by_halves=True) is None


@pytest.mark.parametrize("m", [1, 10, 130, 383, 384, 600])
@pytest.mark.parametrize("n", [1, 150])
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("embedded", [False, True])
def test_the_gram_matrix_is_a_product(m, n, by_columns, dtype, embedded):
    X = torch.randn(n, m, dtype=dtype).mT if by_columns else torch.randn(m, n, dtype=dtype)
    c = 0.5
    embedding = Embedding(spike_basis(X, c, min(m, 7))) if embedded else None
    Z = (X if embedding is None else embedding.apply(X)) / c
    gram = gram_matrix(X, c, embedding)
    assert gram.is_contiguous()
    exact = Z.double() @ Z.double().mT
    error = torch.linalg.matrix_norm(gram.double() - exact) / torch.linalg.matrix_norm(exact)
    assert error < (2e-6 if dtype == torch.float32 else 1e-14)
    torch.testing.assert_close(gram, gram.mT)
    if m >= 512:
        assert torch.equal(gram, gram.mT)


@pytest.mark.parametrize("n", [1, 127, 321])
@pytest.mark.parametrize("by_halves", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_resolvent_is_added_with_its_weight(n, dtype, by_halves):
    X = spectra.matrix(n, n, spectra.ten_spikes(n))
    gram = (300 * X @ X.mT).to(dtype)
    root = torch.eye(n, dtype=dtype)
    found = add_resolvent_(root, gram, 2.0, 3.0, by_halves=by_halves)
    exact = torch.linalg.inv(gram.double() + 3 * torch.eye(n, dtype=torch.float64))
    rough = 2e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(found.double(), exact, rtol=rough, atol=rough)
    torch.testing.assert_close(root.double(), torch.eye(n, dtype=torch.float64) + 2 * exact, rtol=rough, atol=rough)


def test_the_embedding_is_an_isometry_that_gives_the_spike_rows_of_its_own():
    X = spectra.with_spectrum("ten spikes", 90, 110)
    embedding = Embedding(spike_basis(X, 1.0, 16))
    Z = embedding.apply(X)
    torch.testing.assert_close(Z.mT @ Z, X.mT @ X)
    torch.testing.assert_close(embedding.fold(Z.clone()), X)
    assert torch.linalg.matrix_norm(Z[16:], ord=2) < 0.05 * torch.linalg.matrix_norm(X, ord=2)
    rows = Z[:16] @ Z[:16].mT
    torch.testing.assert_close(rows, rows.diagonal().diag(), rtol=0, atol=1e-12)
    arbitrary = Embedding(torch.linalg.qr(torch.randn(90, 5, dtype=torch.float64)).Q)
    torch.testing.assert_close(arbitrary.fold(arbitrary.apply(X)), X)


@pytest.mark.parametrize("spectrum", spectra.SPECTRA)
def test_the_estimate_of_the_largest_eigenvalue_is_within_its_margin(spectrum):
    X = spectra.with_spectrum(spectrum, 200, 300)
    assert 1 / POWER_MARGIN < largest_eigenvalue(X @ X.mT) <= 1 + 1e-9
    assert 1 - 1e-9 <= eigenvalue_bound(X @ X.mT) <= 200**0.25 * (1 + 1e-9)


def test_a_far_resolvent_is_one_to_within_the_error_of_the_line():
    X = spectra.matrix(100, 120, torch.cat([torch.linspace(50, 20, 8), torch.linspace(3, 0, 92)]))
    gram = gram_matrix(X, 1.0, Embedding(spike_basis(X, 1.0, 16)))
    tail = torch.linalg.eigvalsh(gram[16:, 16:])[-1].item()
    for shift, weight in ((1e3, 1.0), (5e3, 3.0)):
        exact = torch.linalg.inv(gram + shift * torch.eye(116, dtype=torch.float64))
        added = add_far_resolvent_(torch.ones_like(gram), gram, weight, shift, tail, 16)
        error = torch.linalg.matrix_norm(added - weight * exact - 1, ord=2)
        assert error <= 1.01 * weight * (shift**-0.5 - (shift + tail) ** -0.5) ** 2 / 2
