r"""Tails of the distribution of noise entries: maximum-likelihood fits of three densities, and the kurtosis.

    Gaussian:      y ~ N(0, σ²)
    Student:       y ~ s · t_ν, whose tail falls as |y|^(−ν−1); ν → ∞ is the Gaussian
    contaminated:  y = x + n, x ~ N(0, σ²), n ~ Cauchy(0, γ) with probability ε and 0 otherwise (arXiv 2605.27733)

The contaminated density is (1 − ε) φ_σ + ε V(σ, γ) with the Voigt profile V, the real part of the Faddeeva function.
Entries are put in fine bins first, so that the time of a fit does not depend on their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spectrim.operators import entry_scale
from spectrim.operators.faddeeva import faddeeva

__all__ = ["Kurtosis", "TailFit", "fit_tails", "kurtosis", "log_density"]

BINS = 256
"""Number of bins of |y|, of equal width in arsinh(|y|/scale), which is narrow compared with all densities."""

ITERATIONS = 60

Parameters = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class TailFit:
    """A density with its maximum-likelihood parameters.

    Attributes:
        model: "gaussian", "student" or "contaminated".
        parameters: "sigma"; or "scale" and "freedom" (ν); or "sigma", "gamma" and "contamination" (ε). Scales are in
            the units of the entries.
        log_likelihood: per entry, in nats.
        aic: Akaike's criterion, twice the number of parameters less twice the log-likelihood of all entries. It assumes
            independent entries, which those of one matrix are not: compare log-likelihoods per entry too.
    """

    model: str
    parameters: Parameters
    log_likelihood: float
    aic: float


def fit_tails(values: Tensor) -> list[TailFit]:
    """Fit the three densities to values of mean zero; the best by Akaike's criterion comes first.

    Args:
        values: floating point, any shape. Exact zeros are ignored, since a density that shrinks to zero would fit them
            best.

    Raises:
        ValueError: fewer than eight values are not zero, or a value is not finite.
    """
    y = values[values != 0]
    if y.numel() < 8 or not y.isfinite().all():
        raise ValueError(f"values of shape {tuple(values.shape)}: expected at least 8 that are finite and not zero")
    sigma = float(y.double().square().mean().sqrt())
    unit = float(entry_scale(y))
    places, weights = _bins(y, unit)
    fits = [_fitted("gaussian", {"sigma": sigma}, places, weights, unit, y.numel())]
    for model, transform in (("student", _student_parameters), ("contaminated", _contaminated_parameters)):
        best = _maximise(model, transform, places, weights)
        parameters = {key: value * unit if key in SCALES else value for key, value in best.items()}
        fits.append(_fitted(model, parameters, places, weights, unit, y.numel()))
    return sorted(fits, key=lambda fit: fit.aic)


def log_density(model: str, values: Tensor, parameters: Parameters) -> Tensor:
    """The logarithm of a density at values of any shape, in float64.

    Raises:
        ValueError: the model is unknown.
    """
    if model not in _LOG_DENSITIES:
        raise ValueError(f"model={model!r}: expected one of {', '.join(map(repr, _LOG_DENSITIES))}")
    own = {key: torch.tensor(value, dtype=torch.float64) for key, value in parameters.items()}
    return _LOG_DENSITIES[model](values.double(), own)


@dataclass(frozen=True, kw_only=True)
class Kurtosis:
    """Excess kurtosis, zero for a Gaussian.

    Attributes:
        pooled: over all entries and batches. It is positive even for Gaussian entries if their variances differ.
        within: over batches for one entry, averaged over entries and corrected for the number of batches; different
            variances of entries do not affect it.
    """

    pooled: float
    within: float


def kurtosis(values: Tensor) -> Kurtosis:
    """The excess kurtosis of (K, P): P entries, each on K >= 4 batches. The mean over batches is subtracted here.

    The expected fourth moment over squared variance of K Gaussian values is 3 (K − 1)/(K + 1), which is corrected for.
    With K values the kurtosis stays below K, so few batches cannot show a heavy tail.
    """
    y = values.double() - values.double().mean(0)
    second, fourth = y.square().mean(0), y.pow(4).mean(0)
    used = second > 0
    if not used.any():
        return Kurtosis(pooled=math.nan, within=math.nan)
    second, fourth = second[used], fourth[used]
    count = len(y)
    within = float((fourth / second.square()).mean()) * (count + 1) / (count - 1) - 3
    return Kurtosis(pooled=float(fourth.mean() / second.mean().square()) - 3, within=within)


SCALES = ("sigma", "scale", "gamma")
"""Parameters in the units of the entries."""

GRIDS: dict[str, tuple[tuple[float, ...], ...]] = {
    "student": ((-1.0, -0.5, 0.0), (0.0, 1.0, 2.0, 4.0)),
    "contaminated": ((-2.0, -1.0, -0.3, 0.0), (-3.0, -1.5, 0.0, 2.0), (-6.0, -3.0, 0.0, 4.0)),
}
"""Starting points of the search: values of ln s and ln ν; or of ln σ, ln γ and the logit of ε."""


def _student_parameters(free: Tensor) -> dict[str, Tensor]:
    return {"scale": free[..., 0].exp(), "freedom": free[..., 1].clamp(-3, 8).exp()}


def _contaminated_parameters(free: Tensor) -> dict[str, Tensor]:
    return {
        "sigma": free[..., 0].exp(),
        "gamma": free[..., 1].clamp(-9, 12).exp(),
        "contamination": free[..., 2].sigmoid(),
    }


def _maximise(
    model: str, transform: Callable[[Tensor], dict[str, Tensor]], places: Tensor, weights: Tensor
) -> Parameters:
    """The maximum-likelihood parameters, by quasi-Newton steps on unbounded parameters from the best grid point."""
    density = _LOG_DENSITIES[model]
    grid = torch.cartesian_prod(*(torch.tensor(axis, dtype=torch.float64) for axis in GRIDS[model]))
    # The densities have one row for each grid point and one column for each bin.
    likelihoods = density(places, {key: value[:, None] for key, value in transform(grid).items()}) @ weights
    free = grid[likelihoods.nan_to_num(-math.inf).argmax()].clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [free], max_iter=ITERATIONS, line_search_fn="strong_wolfe", tolerance_grad=1e-7, tolerance_change=1e-9
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -(weights * density(places, transform(free))).sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return {key: float(value) for key, value in transform(free.detach()).items()}


def _fitted(model: str, parameters: Parameters, places: Tensor, weights: Tensor, unit: float, count: int) -> TailFit:
    likelihood = float((weights * log_density(model, places * unit, parameters)).sum())
    return TailFit(
        model=model, parameters=parameters, log_likelihood=likelihood, aic=2 * len(parameters) - 2 * count * likelihood
    )


def _bins(y: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """The root mean square of |y|/unit in every bin, (bins,), and its share of the entries, without empty bins."""
    size = y.double().abs() / unit
    place = torch.asinh(size)
    index = (place * ((BINS - 1) / place.max().clamp_min(1e-12))).long()
    counts = torch.bincount(index, minlength=BINS).double()
    squares = torch.zeros(BINS, dtype=torch.float64, device=y.device).index_add_(0, index, size.square())
    used = counts > 0
    return (squares[used] / counts[used]).sqrt().cpu(), (counts[used] / counts.sum()).cpu()


def _gaussian(y: Tensor, own: dict[str, Tensor]) -> Tensor:
    sigma = own["sigma"]
    return -0.5 * (y / sigma).square() - sigma.log() - 0.5 * math.log(2 * math.pi)


def _student(y: Tensor, own: dict[str, Tensor]) -> Tensor:
    scale, freedom = own["scale"], own["freedom"]
    constant = torch.lgamma((freedom + 1) / 2) - torch.lgamma(freedom / 2) - 0.5 * (freedom * math.pi).log()
    return constant - scale.log() - (freedom + 1) / 2 * torch.log1p((y / scale).square() / freedom)


def _contaminated(y: Tensor, own: dict[str, Tensor]) -> Tensor:
    sigma, gamma, share = own["sigma"], own["gamma"], own["contamination"]
    # The profile is even in y; faddeeva takes the half plane.
    place = y.abs() / (sigma * math.sqrt(2))
    z = torch.complex(place, (gamma / (sigma * math.sqrt(2))).expand(place.shape))
    tiny = torch.finfo(torch.float64).tiny
    voigt = faddeeva(z).real.clamp_min(tiny).log() - sigma.log() - 0.5 * math.log(2 * math.pi)
    return torch.logaddexp((1 - share).clamp_min(tiny).log() + _gaussian(y, own), share.clamp_min(tiny).log() + voigt)


_LOG_DENSITIES: dict[str, Callable[[Tensor, dict[str, Tensor]], Tensor]] = {
    "gaussian": _gaussian,
    "student": _student,
    "contaminated": _contaminated,
}
