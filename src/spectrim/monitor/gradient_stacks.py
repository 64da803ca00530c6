"""Stacks (K, m, n) of one matrix's gradients on K batches, and functions that their analyses share.

Estimates never use a batch twice, which would bias them: inner products leave out a batch's product with itself, and
directions from one half of the batches are measured on the other half.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Decomposed", "Estimate", "check_stack", "decompose", "halves", "jackknife"]

FEWEST_BATCHES = 4
"""Each half needs two batches for a variance."""


class Estimate(NamedTuple):
    """A value and its standard error, in the same units."""

    value: float
    error: float


class Decomposed(NamedTuple):
    """Singular values of a wide stack (K, m, n) and its left singular vectors.

    values: (K, m), descending, in float64. left: (K, m, m), in the stack's dtype.
    """

    values: Tensor
    left: Tensor


def check_stack(gradients: Tensor) -> None:
    """Raise ValueError unless the gradients are (K, m, n) with at least four batches, real and finite."""
    if gradients.ndim != 3 or gradients.shape[0] < FEWEST_BATCHES or not gradients.is_floating_point():
        raise ValueError(
            f"gradients of shape {tuple(gradients.shape)} and dtype {gradients.dtype}: expected (batches, m, n), "
            f"floating point, with at least {FEWEST_BATCHES} batches"
        )
    if not gradients.isfinite().all():
        raise ValueError("gradients hold entries that are not finite")


def halves(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """The batches with even and with odd indices."""
    return gradients[0::2], gradients[1::2]


def decompose(gradients: Tensor) -> Decomposed:
    """Singular values and left singular vectors of every matrix of a wide stack (K, m, n), m <= n.

    U has the eigenvectors of the float64 Gram matrix, and the values are the norms of the rows of UᵀX, exact to 1e-7 of
    the largest. One matrix at a time is held in float64.
    """
    values, left = [], []
    for matrix in gradients:
        X = matrix.double()
        # Descending, like singular values.
        U = torch.linalg.eigh(X @ X.mT).eigenvectors.flip(-1)
        found, order = (U.mT @ X).square().sum(-1).sqrt().sort(descending=True)
        values.append(found)
        left.append(U[:, order].to(gradients.dtype))
    return Decomposed(torch.stack(values), torch.stack(left))


def jackknife(left_out: Tensor, value: float) -> Estimate:
    """An estimate with its standard error, from the K estimates (K,) that leave out one batch each."""
    count = left_out.numel()
    variance = (count - 1) / count * (left_out.double() - left_out.double().mean()).square().sum()
    return Estimate(value, float(variance.sqrt()))
