"""Energy and noise of the spike and the tail of a gradient's spectrum, and the spike's share in Adam's second moment.

The spike is the k = max(1, round(1.5 % of min(m, n))) largest singular values, as in the optimizer Spectra
(arXiv 2602.11185). All functions take a stack of gradients, one for each batch (:mod:`gradient_stacks`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spectrim.monitor.gradient_stacks import Decomposed, check_stack, decompose, halves
from spectrim.monitor.sketch import wide

__all__ = ["DirectionNoise", "SecondMoment", "direction_noise", "rank_edges", "second_moment", "spike_energy"]

RESOLVED = 2.0
"""A mean is divided by only if it exceeds zero by this many standard errors."""


def spike_energy(values: Tensor, rank: int) -> float:
    """The share of the energy Σσ² in the ``rank`` largest singular values (..., r), summed over a stack."""
    squares = values.double().square()
    whole = float(squares.sum())
    return float(squares.sort(-1, descending=True).values[..., :rank].sum()) / whole if whole > 0 else math.nan


@dataclass(frozen=True, kw_only=True)
class DirectionNoise:
    """The variance over batches of the gradient along the mean's singular vectors uᵢ, vᵢ, for ranks first to last.

    Attributes:
        first, last: ranks, from 1.
        mean_square: (uᵢᵀ G vᵢ)² averaged over these ranks, corrected for noise.
        variance: the variance of uᵢᵀ g vᵢ over batches, averaged over these ranks.
        relative: variance over mean_square; None if the mean is not significantly different from zero.
        at_least: if ``relative`` is None, a lower bound: the variance over the largest mean square within two standard
            errors.
    """

    first: int
    last: int
    mean_square: float
    variance: float
    relative: float | None
    at_least: float | None


def direction_noise(gradients: Tensor, edges: list[int] | None = None) -> list[DirectionNoise]:
    """The relative variance over batches of the gradient along the mean's singular vectors, by groups of ranks.

    Args:
        gradients: (K, m, n), one matrix's gradient on each of K >= 4 independent batches.
        edges: the last rank of every group, ascending; :func:`rank_edges` by default.

    Singular vectors of one half of the batches are measured on the other half, and vice versa. Measured on their own
    batches, noise would look like a constant direction.
    """
    check_stack(gradients)
    X = wide(gradients)
    edges = edges or rank_edges(X.shape[-2])
    means, variances, errors = [], [], []
    first, second = halves(X)
    for source, measured in ((first, second), (second, first)):
        U, _, Vh = torch.linalg.svd(source.double().mean(0), full_matrices=False)
        along = torch.stack([((U.mT @ gradient.double()) * Vh).sum(-1) for gradient in measured])
        variance = along.var(0)
        means.append(along.mean(0).square() - variance / len(measured))
        variances.append(variance)
        # The error of the square of a mean that is zero.
        errors.append(math.sqrt(2) * variance / len(measured))
    mean, variance, error = (torch.stack(parts).mean(0) for parts in (means, variances, errors))
    found, begin = [], 0
    for end in edges:
        group = slice(begin, end)
        size = end - begin
        square, spread = float(mean[group].mean()), float(variance[group].mean())
        # Assumes that the estimates of the two halves, and of different ranks, are independent.
        bound = RESOLVED * float(error[group].square().sum().sqrt()) / size / math.sqrt(2)
        resolved = square > bound
        found.append(
            DirectionNoise(
                first=begin + 1,
                last=end,
                mean_square=square,
                variance=spread,
                relative=spread / square if resolved else None,
                at_least=None if resolved or bound <= 0 else spread / (max(square, 0.0) + bound),
            )
        )
        begin = end
    return found


def rank_edges(size: int) -> list[int]:
    """The last ranks of groups that double in size: 1, 2, 4, 8, ..., size."""
    return [*(2**power for power in range(max(1, size).bit_length()) if 2**power < size), size]


@dataclass(frozen=True, kw_only=True)
class SecondMoment:
    """The share of each batch's spike in E[g²], the second moment by which Adam divides.

    With g = S + T, where S is the spike of this batch's g and T the tail:

    Attributes:
        share: Σ E[S²] / Σ E[g²] over all entries. The shares of S and T add up to 1, since they are orthogonal.
        median_share: the median over entries of E[S²] / (E[S²] + E[T²]).
        contraction: the root mean square over entries of T/√E[g²], Adam's update of the tail. Without a spike it would
            be T/√E[T²], whose root mean square is 1.
    """

    share: float
    median_share: float
    contraction: float


def second_moment(gradients: Tensor, rank: int, *, decomposed: Decomposed | None = None) -> SecondMoment:
    """The share of the spike in the second moment, see :class:`SecondMoment`.

    Args:
        gradients: (K, m, n), one matrix's gradient on each of K >= 4 batches.
        rank: k, from 1 to min(m, n).
        decomposed: the result of :func:`~spectrim.monitor.gradient_stacks.decompose` on the wide stack, if known.

    The second moment is the mean over these batches, not Adam's running mean, which includes earlier weights.
    """
    check_stack(gradients)
    X = wide(gradients)
    _, left = decomposed or decompose(X)
    spike, tail, whole = (torch.zeros_like(X[0], dtype=torch.float64) for _ in range(3))
    for gradient, vectors in zip(X, left, strict=True):
        U = vectors[:, :rank]
        S = U @ (U.mT @ gradient)
        spike += S.double().square()
        tail += (gradient - S).double().square()
        whole += gradient.double().square()
    used = whole > 0
    if not used.any():
        return SecondMoment(share=math.nan, median_share=math.nan, contraction=math.nan)
    spike, tail, whole = (each[used] for each in (spike, tail, whole))
    return SecondMoment(
        share=float(spike.sum() / (spike.sum() + tail.sum())),
        median_share=float((spike / (spike + tail)).median()),
        contraction=float((tail / whole).mean().sqrt()),
    )
