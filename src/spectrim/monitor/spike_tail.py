"""The spike and the tail of a gradient's spectrum: who holds the energy, who varies, who fills Adam's second moment.

The spike is the k = max(1, round(1.5 % of min(m, n))) leading singular directions, as the optimizer Spectra takes it
(arXiv 2602.11185). All is measured on a stack of gradients, one a batch (:mod:`gradient_stacks`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spectrim.monitor.gradient_stacks import Decomposed, check_stack, decompose, halves
from spectrim.monitor.sketch import wide

__all__ = [
    "DirectionNoise",
    "SecondMoment",
    "direction_noise",
    "rank_edges",
    "second_moment",
    "spike_energy",
]

RESOLVED = 2.0
"""Standard errors by which a mean must differ from zero before it is divided by."""


def spike_energy(values: Tensor, rank: int) -> float:
    """Share of the energy Σσ² in the ``rank`` largest singular values, (..., r); stacks are taken together."""
    squares = values.double().square()
    whole = float(squares.sum())
    return float(squares.sort(-1, descending=True).values[..., :rank].sum()) / whole if whole > 0 else math.nan


@dataclass(frozen=True, kw_only=True)
class DirectionNoise:
    """How the gradient along singular directions uᵢ, vᵢ of the mean varies over batches, for ranks first to last.

    Attributes:
        first, last: ranks, from 1.
        mean_square: the mean of (uᵢᵀ G vᵢ)² over these directions, without the noise that is in a mean of few batches.
        variance: of uᵢᵀ g vᵢ over batches, the mean over these directions.
        relative: variance over mean_square; None where the mean is not told apart from zero.
        at_least: a bound from below on it, where it is None: the variance over the largest mean square that two
            standard errors allow.
    """

    first: int
    last: int
    mean_square: float
    variance: float
    relative: float | None
    at_least: float | None


def direction_noise(gradients: Tensor, edges: list[int] | None = None) -> list[DirectionNoise]:
    """Relative variance of the singular directions of the mean gradient over batches, by groups of ranks.

    Args:
        gradients: (K, m, n), one matrix's gradient on each of K >= 4 independent batches.
        edges: the last rank of every group, ascending; :func:`rank_edges` unless given.

    Directions are those of the mean over one half of the batches, and are measured on the other half, both ways: on the
    batches they come from, even noise would look like a steady direction.
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
        # Of the square of a mean with this error, were the mean zero.
        errors.append(math.sqrt(2) * variance / len(measured))
    mean, variance, error = (torch.stack(parts).mean(0) for parts in (means, variances, errors))
    found, begin = [], 0
    for end in edges:
        group = slice(begin, end)
        size = end - begin
        square, spread = float(mean[group].mean()), float(variance[group].mean())
        # The two halves' estimates, and those of different directions, are taken for independent.
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
    """Ends of groups of ranks that double: 1, 2, 4, 8, ... and the last."""
    return [*(2**power for power in range(max(1, size).bit_length()) if 2**power < size), size]


@dataclass(frozen=True, kw_only=True)
class SecondMoment:
    """What the spike of each batch's gradient puts into E[g²], the second moment that Adam divides by.

    With g = S + T, S the k leading singular directions of this batch's g and T the rest:

    Attributes:
        share: Σ E[S²] / Σ E[g²] over all entries. S and T are orthogonal, so that their shares add up to 1.
        median_share: the median over entries of E[S²] / (E[S²] + E[T²]): in a typical entry, not in the largest.
        contraction: how much shorter the spike makes the tail's update. Adam's step holds T/√E[g²]; without a spike it
            would be T/√E[T²]. This is the root mean square over entries of the first, the second one's being 1.
    """

    share: float
    median_share: float
    contraction: float


def second_moment(gradients: Tensor, rank: int, *, decomposed: Decomposed | None = None) -> SecondMoment:
    """How much of the second moment the spike holds, see :class:`SecondMoment`.

    Args:
        gradients: (K, m, n), one matrix's gradient on each of K >= 4 batches.
        rank: k, from 1 to min(m, n).
        decomposed: of :func:`~spectrim.monitor.gradient_stacks.decompose` on the wide stack, where that is at hand.

    The second moment is the plain mean over the batches: Adam's running mean has seen other weights on the way.
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
