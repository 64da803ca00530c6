"""Spectral metrics of matrices: pure functions of (..., m, n), estimated by default and exact on request.

An estimate is a sketch on the matrix's device (:mod:`sketch`), from which functions named ``..._of`` compute the metric
on the host. The monitor sketches many matrices and reads all at once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectrim.monitor.sketch import entry_statistics, gram_of_singular_values, krylov_gram, lanczos_coefficients, wide
from spectrim.operators._stack import as_matrices

__all__ = [
    "localisation",
    "rank_of_spike",
    "share_above",
    "share_of",
    "singular_values",
    "singular_values_of",
    "spectral_norm",
    "spike_share",
    "stable_rank",
    "tail_index",
]

#: The share of singular values that form the spike (arXiv 2602.11185).
RANK_RATIO = 0.015


def singular_values(X: Tensor) -> Tensor:
    """All singular values of every matrix, (..., min(m, n)), descending, in float64.

    They come from the float64 Gram matrix of the smaller side, exact to 1e-8 of the largest, as float32 data allow.
    """
    return singular_values_of(gram_of_singular_values(wide(as_matrices(X))))


def spectral_norm(X: Tensor, *, exact: bool = False) -> Tensor:
    """The largest singular value σ₁ of every matrix, (...), in float64.

    The estimate never exceeds it. It is within 1 % for pure noise, and much closer if the spectrum decays.
    """
    return _leading(X, 1, exact)[..., 0]


def stable_rank(X: Tensor, *, exact: bool = False) -> Tensor:
    """‖X‖_F²/σ₁², the effective number of singular values, from 1 to min(m, n); NaN for a zero matrix."""
    return entry_statistics(as_matrices(X)).energy / spectral_norm(X, exact=exact).square()


def spike_share(X: Tensor, rank_ratio: float = RANK_RATIO, *, exact: bool = False) -> Tensor:
    """The share of ‖X‖_F² in the max(1, round(r min(m, n))) largest singular values; NaN for a zero matrix."""
    rank = rank_of_spike(X.shape, rank_ratio)
    leading = _leading(X, rank, exact)[..., :rank].square().sum(-1)
    return (leading / entry_statistics(as_matrices(X)).energy).clamp_max(1.0)


def localisation(X: Tensor, *, exact: bool = False) -> Tensor:
    """max|X_ij|/σ₁, from 1/√(mn) to 1: near 1, the largest singular value comes from single entries.

    It is about √(2 ln mn)/(√m + √n) for Gaussian entries, and NaN for a zero matrix.
    """
    return entry_statistics(as_matrices(X)).largest / spectral_norm(X, exact=exact)


def tail_index(X: Tensor, *, exact: bool = False) -> Tensor:
    """Hill's estimate of α in P(|x| > t) ~ t^−α, from the largest 1 % of the entries: 1 is Cauchy, 8 about Gaussian.

    Args:
        X: (..., m, n).
        exact: use all entries instead of an even sample of at most 65,536.
    """
    Y = as_matrices(X)
    return (entry_statistics(Y, sample=None) if exact else entry_statistics(Y)).tail_index


def share_above(X: Tensor, threshold: float | Tensor, *, exact: bool = False) -> Tensor:
    """The share of the min(m, n) singular values that exceed a threshold, (...).

    The estimate, by stochastic Lanczos quadrature, has an error of a few hundredths.

    Args:
        X: (..., m, n).
        threshold: one for all matrices, or a tensor of shape (...).
        exact: count the singular values instead.
    """
    bound = torch.as_tensor(threshold, dtype=torch.float64)
    if exact:
        return (singular_values(X) > bound[..., None]).double().mean(-1)
    return share_of(lanczos_coefficients(wide(as_matrices(X))), bound)


def rank_of_spike(shape: tuple[int, ...] | torch.Size, rank_ratio: float = RANK_RATIO) -> int:
    """The number of singular values in the spike of an m x n matrix."""
    return max(1, round(rank_ratio * min(shape[-2:])))


def singular_values_of(gram: Tensor) -> Tensor:
    """Singular values, descending, from a Gram matrix (..., s, s); NaN if it is not finite."""
    finite = gram.isfinite().all(-1).all(-1)[..., None, None]
    squares = torch.linalg.eigvalsh(torch.where(finite, gram, 0.0)).flip(-1)
    return torch.where(finite[..., 0], squares.clamp_min(0).sqrt(), math.nan)


def share_of(coefficients: Tensor, threshold: Tensor) -> Tensor:
    """The share of singular values above a threshold (...), from :func:`~spectrim.monitor.sketch.lanczos_coefficients`.

    Each start gives the nodes and weights of a Gauss quadrature. Between nodes, the distribution is interpolated
    linearly in the logarithm of the singular value, with half of a node's weight on either side.
    """
    diagonal, off = coefficients.unbind(-2)
    finite = coefficients.isfinite().all(-1).all(-1).all(-1)
    safe = torch.where(finite[..., None, None], diagonal, 0.0)
    beside = torch.where(finite[..., None, None], off, 0.0)[..., :-1]
    tridiagonal = torch.diag_embed(safe) + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    weights = vectors[..., 0, :].square()
    tiny = nodes.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny) * 1e-16
    places = torch.maximum(nodes, tiny).log()
    middles = weights.cumsum(-1) - weights / 2
    at = 2 * threshold.double().clamp_min(torch.finfo(torch.float64).tiny).log()
    below = _interpolated(at[..., None].expand(places.shape[:-1]), places, middles)
    return torch.where(finite, 1 - below.mean(-1), math.nan)


def _interpolated(at: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """A piecewise linear distribution function with K nodes (..., K), at one point (...)."""
    index = torch.searchsorted(places.contiguous(), at[..., None].contiguous())
    right = index.clamp(1, max(1, places.shape[-1] - 1))
    right = right.clamp_max(places.shape[-1] - 1)
    left = (right - 1).clamp_min(0)
    x0, x1 = places.gather(-1, left), places.gather(-1, right)
    y0, y1 = values.gather(-1, left), values.gather(-1, right)
    share = ((at[..., None] - x0) / (x1 - x0).clamp_min(1e-300)).clamp(0, 1)
    found = (y0 + share * (y1 - y0))[..., 0]
    found = torch.where(index[..., 0] == 0, 0.0, found)
    return torch.where(index[..., 0] == places.shape[-1], 1.0, found)


def _leading(X: Tensor, rank: int, exact: bool) -> Tensor:
    if exact:
        return singular_values(X)
    return singular_values_of(krylov_gram(wide(as_matrices(X)), rank))
