"""Orthogonalisation against the polar factor in float64."""

import pytest
import torch
from hypothesis import given, settings

import oracle
import spectra
from spectrim.operators import orthogonalize, soft_clip


@settings(max_examples=60, deadline=None)
@given(spectra.matrices())
def test_orthogonalize_is_odd_and_commutes_with_transposition(X):
    polar = orthogonalize(X)
    torch.testing.assert_close(orthogonalize(-X), -polar, rtol=0, atol=0)
    torch.testing.assert_close(orthogonalize(X.mT).mT, polar, rtol=0, atol=2e-3)
    assert (oracle.norm(polar) <= 1 + 1e-3).all()


@pytest.mark.parametrize("spectrum", ["flat", "one spike", "ten spikes", "rank-deficient"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (96, 96), (64, 200), (200, 64)])
def test_orthogonalize_matches_the_polar_factor(shape, spectrum):
    X = spectra.with_spectrum(spectrum, *shape).float() * 37
    assert oracle.relative_error(orthogonalize(X), oracle.polar(X)) < 1e-3


@pytest.mark.parametrize("solver", ["auto", "minimax"])
@pytest.mark.parametrize("sigma", [torch.logspace(0, -3, 80), 1e-3 + (torch.arange(80) < 3), torch.ones(80)])
def test_orthogonalize_reaches_three_decades(sigma, solver):
    X = spectra.matrix(80, 120, sigma).float()
    assert oracle.relative_error(orthogonalize(X, solver=solver), oracle.polar(X)) < 1e-3


def test_the_best_quintics_are_more_accurate_than_muons_at_the_same_number_of_steps():
    X = spectra.matrix(64, 96, torch.linspace(1, 0.05, 64)).float()
    errors = [
        oracle.relative_error(orthogonalize(X, solver=solver, steps=5), oracle.polar(X))
        for solver in ("minimax", "muon")
    ]
    assert errors[0] < 0.05 < errors[1]


def test_orthogonalize_compiles_whole():
    X = spectra.matrix(70, 90, torch.logspace(0, -2, 70)).float()
    compiled = torch.compile(orthogonalize, fullgraph=True, backend="aot_eager")
    assert oracle.relative_error(compiled(X), oracle.polar(X)) < 1e-3


def test_a_matrix_that_is_not_finite_does_not_touch_the_others():
    X = torch.stack([torch.eye(4), torch.full((4, 4), torch.inf)])
    polar = orthogonalize(X)
    torch.testing.assert_close(polar[0], X[0])
    assert polar[1].isnan().all()


def test_the_rough_form_is_muons():
    X = spectra.matrix(64, 96, torch.linspace(1, 0.05, 64)).float()
    rough = orthogonalize(X, solver="muon", steps=5)
    sigma = torch.linalg.svdvals(rough)
    assert sigma.min() > 0.5
    assert sigma.max() < 1.25
    expected = torch.optim._muon._zeropower_via_newtonschulz(X, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    assert oracle.relative_error(rough, expected.double()) < 0.05  # torch works in bfloat16
    assert torch.equal(orthogonalize(X, solver="muon"), rough)


@pytest.mark.parametrize("shape", [(1, 1), (4, 6), (3, 4, 2), (0, 4)])
def test_orthogonalize_of_zero_is_zero(shape):
    for steps in (None, 5):
        for solver in ("auto", "minimax"):
            assert torch.equal(orthogonalize(torch.zeros(shape), steps=steps, solver=solver), torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_orthogonalize_keeps_the_dtype(dtype):
    X = spectra.with_spectrum("flat", 32, 48).to(dtype)
    polar = orthogonalize(X)
    assert polar.dtype == dtype
    assert oracle.relative_error(polar, oracle.polar(X)) < 1e-2


def test_bad_arguments_are_named_with_what_is_allowed():
    with pytest.raises(ValueError, match="steps=0: expected a positive"):
        orthogonalize(torch.ones(3, 3), steps=0)
    with pytest.raises(ValueError, match=r"solver='qr': expected one of 'auto'"):
        orthogonalize(torch.ones(3, 3), solver="qr")


@pytest.mark.parametrize("spectrum", spectra.SPECTRA)
@pytest.mark.parametrize("steps", [3, 5, 8])
def test_on_a_host_the_rough_form_leaves_no_direction_further_from_one_than_its_formula(spectrum, steps):
    X = spectra.with_spectrum(spectrum, 96, 130)
    sigma = torch.linalg.svdvals(X)
    c = 3.4445**-steps * sigma.square().sum().sqrt()
    expected = oracle.soft_clip(X, c) / c
    assert oracle.relative_error(orthogonalize(X.float(), steps=steps), expected) < 0.2
    torch.testing.assert_close(orthogonalize(X.float().mT, steps=steps), orthogonalize(X.float(), steps=steps).mT)


def test_overwriting_gives_the_same_result_in_the_place_of_the_matrix():
    X = torch.randn(90, 2100)
    for operator in (lambda Y, **how: orthogonalize(Y, steps=5, **how), lambda Y, **how: soft_clip(Y, 5.0, **how)):
        for matrix in (X, X.mT):
            expected, spent = operator(matrix), matrix.clone()
            assert operator(spent, overwrite=True).data_ptr() == spent.data_ptr()
            torch.testing.assert_close(spent, expected)
