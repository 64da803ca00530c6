"""Stacks of gradients, one matrix a batch, and what the analysis of them has in common.

A stack is (K, m, n): the gradient of one matrix on K batches. Every estimate here that could flatter itself by using a
batch twice is made without that: inner products leave a batch's product with itself out, and directions are taken from
one half of the batches and measured on the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Decomposed", "Estimate", "check_stack", "decompose", "halves", "jackknife"]

FEWEST_BATCHES = 4
"""Two in each half: fewer have no variance."""


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
    """Refuse what is no stack of gradients.

    Raises:
        ValueError: not (K, m, n) with at least four batches, not real, or not finite.
    """
    if gradients.ndim != 3 or gradients.shape[0] < FEWEST_BATCHES or not gradients.is_floating_point():
        raise ValueError(
            f"gradients of shape {tuple(gradients.shape)} and dtype {gradients.dtype}: expected (batches, m, n), "
            f"floating point, with at least {FEWEST_BATCHES} batches"
        )
    if not gradients.isfinite().all():
        raise ValueError("gradients hold entries that are not finite")


def halves(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Every second batch, and the others."""
    return gradients[0::2], gradients[1::2]


def decompose(gradients: Tensor) -> Decomposed:
    """Singular values and left singular vectors of every matrix of a wide stack (K, m, n), m <= n.

    From the eigenvectors of the float64 Gram matrix, the values read from the rows of UᵀX: right to 1e-7 of the
    largest. One matrix at a time is held in float64.
    """
    values, left = [], []
    for matrix in gradients:
        X = matrix.double()
        # Descending, as singular values are.
        U = torch.linalg.eigh(X @ X.mT).eigenvectors.flip(-1)
        found, order = (U.mT @ X).square().sum(-1).sqrt().sort(descending=True)
        values.append(found)
        left.append(U[:, order].to(gradients.dtype))
    return Decomposed(torch.stack(values), torch.stack(left))


def jackknife(left_out: Tensor, value: float) -> Estimate:
    """The standard error of an estimate from K values, (K,), each made without one batch."""
    count = left_out.numel()
    variance = (count - 1) / count * (left_out.double() - left_out.double().mean()).square().sum()
    return Estimate(value, float(variance.sqrt()))
