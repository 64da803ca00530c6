"""Upper bounds on the largest singular value, by one pass over the matrix. They hold up to rounding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._stack import as_matrices, entry_maximum

__all__ = ["entry_bound", "frobenius_bound", "spectral_norm_bound", "sum_bound"]


def frobenius_bound(X: Tensor) -> Tensor:
    """‖X‖_F of every matrix of (..., m, n): tight if one singular value dominates."""
    X = as_matrices(X)
    scale = entry_maximum(X)
    norm: Tensor = torch.linalg.vector_norm(X / scale, dim=(-2, -1))
    return scale[..., 0, 0] * norm


def entry_bound(X: Tensor) -> Tensor:
    """√(mn) max|X_ij| of every matrix of (..., m, n): the best bound from the shape and the largest entry."""
    X = as_matrices(X)
    largest: Tensor = torch.linalg.vector_norm(X, ord=math.inf, dim=(-2, -1))
    return largest * math.sqrt(X.shape[-2] * X.shape[-1])


def sum_bound(X: Tensor) -> Tensor:
    """√(‖X‖₁ ‖X‖_∞), from the largest absolute column and row sums: tight for sparse and block-diagonal matrices."""
    X = as_matrices(X).abs()
    return (X.sum(-2).amax(-1)).sqrt() * (X.sum(-1).amax(-1)).sqrt()


def spectral_norm_bound(X: Tensor) -> Tensor:
    """The smallest bound of this module, for every matrix of (..., m, n)."""
    return torch.minimum(frobenius_bound(X), sum_bound(X))
