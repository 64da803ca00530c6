"""Fits of tails: parameters that were planted come back, and the right model wins."""

import math

import pytest
import torch
from scipy import stats
from scipy.special import voigt_profile

from spectrim.monitor.tails import fit_tails, kurtosis, log_density

COUNT = 100_000


def drawn(kind: str, unit: float) -> torch.Tensor:
    torch.manual_seed(0)
    if kind == "gaussian":
        return unit * torch.randn(COUNT)
    if kind == "student":
        return unit * torch.distributions.StudentT(4.0).sample((COUNT,))
    noise = torch.distributions.Cauchy(0.0, 5.0).sample((COUNT,))
    return unit * (torch.randn(COUNT) + (torch.rand(COUNT) < 0.05) * noise)


PLANTED = {
    "gaussian": {"sigma": 1.0},
    "student": {"scale": 1.0, "freedom": 4.0},
    "contaminated": {"sigma": 1.0, "gamma": 5.0, "contamination": 0.05},
}


@pytest.mark.parametrize("unit", [1.0, 1e-7])
@pytest.mark.parametrize("kind", list(PLANTED))
def test_the_model_that_was_planted_wins_with_its_parameters(kind: str, unit: float) -> None:
    fits = fit_tails(drawn(kind, unit).reshape(100, -1))
    assert fits[0].model == kind
    assert [fit.aic for fit in fits] == sorted(fit.aic for fit in fits)
    for key, value in PLANTED[kind].items():
        scale = unit if key in ("sigma", "scale", "gamma") else 1.0
        assert fits[0].parameters[key] == pytest.approx(value * scale, rel=0.06)


def test_a_gaussian_with_more_parameters_gains_nothing() -> None:
    fits = {fit.model: fit.log_likelihood for fit in fit_tails(drawn("gaussian", 1.0))}
    assert fits["student"] == pytest.approx(fits["gaussian"], abs=1e-4)
    assert fits["contaminated"] == pytest.approx(fits["gaussian"], abs=1e-3)
    assert fits["gaussian"] == pytest.approx(-0.5 * math.log(2 * math.pi * math.e), abs=0.01)


@pytest.mark.parametrize("kind", list(PLANTED))
def test_binned_likelihoods_are_those_of_the_entries(kind: str) -> None:
    values = drawn(kind, 1.0).double()
    for fit in fit_tails(values):
        whole = float(log_density(fit.model, values, fit.parameters).mean())
        assert fit.log_likelihood == pytest.approx(whole, abs=2e-3 if fit.model == kind else 0.02)


def test_densities_agree_with_scipy() -> None:
    y = torch.tensor([0.0, 0.3, -2.0, 40.0, 1e4], dtype=torch.float64)
    student = log_density("student", y, {"scale": 0.7, "freedom": 2.5})
    assert student.numpy() == pytest.approx(stats.t.logpdf(y.numpy(), 2.5, scale=0.7), rel=1e-10)
    found = log_density("contaminated", y, {"sigma": 0.5, "gamma": 0.2, "contamination": 0.3}).exp().numpy()
    exact = 0.7 * stats.norm.pdf(y.numpy(), scale=0.5) + 0.3 * voigt_profile(y.numpy(), 0.5, 0.2)
    assert found == pytest.approx(exact, rel=1e-9)
    with pytest.raises(ValueError, match=r"model='laplace'.*'gaussian', 'student', 'contaminated'"):
        log_density("laplace", y, {})


def test_entries_of_unlike_variance_have_pooled_kurtosis_but_none_within() -> None:
    torch.manual_seed(1)
    scales = torch.exp(torch.randn(4000))
    mixed = kurtosis(torch.randn(16, 4000) * scales)
    assert mixed.pooled > 10
    assert mixed.within == pytest.approx(0, abs=0.1)
    alike = kurtosis(torch.randn(16, 4000))
    assert alike.pooled == pytest.approx(0, abs=0.4)
    heavy = kurtosis(torch.distributions.StudentT(3.0).sample((64, 4000)))
    assert heavy.within > 1


def test_what_cannot_be_fitted_is_refused() -> None:
    for values in (torch.zeros(20), torch.ones(3), torch.tensor([math.inf] + [1.0] * 10)):
        with pytest.raises(ValueError, match="expected at least 8 that are finite and not zero"):
            fit_tails(values)


def test_zeros_are_left_out_of_the_fits() -> None:
    values = drawn("student", 1.0)[:5000]
    padded = fit_tails(torch.cat([values, torch.zeros(20_000)]))
    assert [(fit.model, fit.parameters) for fit in padded] == [(fit.model, fit.parameters) for fit in fit_tails(values)]
