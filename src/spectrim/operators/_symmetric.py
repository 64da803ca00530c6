"""Symmetric matrices on the host: Gram matrices, sums of inverses, and an embedding that sets a spike apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._product import product

__all__ = ["COLUMN_BLOCK", "Embedding", "add_resolvents_", "gram_matrix", "mirror_"]

ROW_BLOCK = 256  # rows of a symmetric product that are computed at a time
COLUMN_BLOCK = 1024  # columns that are worked on at a time, so that no second copy of X is ever held


class Embedding(NamedTuple):
    """X ↦ [QᵀX; X − QQᵀX] for Q (m, k) with orthonormal columns: an isometry, whatever Q is.

    So a function of X Xᵀ is that of the embedded matrix, folded back; but what Q takes of X has rows of its own.
    """

    Q: Tensor

    def apply(self, X: Tensor) -> Tensor:
        """The embedded matrix (k + m, n)."""
        k = self.Q.shape[-1]
        embedded = X.new_empty(k + len(X), X.shape[-1])
        embedded[:k] = product(self.Q.mT, X)
        torch.sub(X, product(self.Q, embedded[:k]), out=embedded[k:])
        return embedded

    def fold(self, A: Tensor) -> Tensor:
        """[Q, I − QQᵀ] A [Q, I − QQᵀ]ᵀ for a symmetric A (k + m, k + m)."""
        k = self.Q.shape[-1]
        for _ in range(2):
            A = (A[k:] + product(self.Q, A[:k] - product(self.Q.mT, A[k:]))).mT
        return A


def gram_matrix(X: Tensor, c: float, embedding: Embedding | None = None) -> Tensor:
    """Z Zᵀ for Z = X/c, embedded or not, of a matrix X (m, n)."""
    m = len(X) if embedding is None else len(X) + embedding.Q.shape[-1]
    gram = X.new_zeros(m, m)
    for columns in torch.split(X, COLUMN_BLOCK, dim=-1):
        if not columns.mT.is_contiguous():
            columns = columns.contiguous()  # products of strided columns are slow
        _add_lower_product_(gram, columns / c if embedding is None else embedding.apply(columns).div_(c))
    return mirror_(gram)


def add_resolvents_(root: Tensor, gram: Tensor, weights: Sequence[float], shifts: Sequence[float]) -> Tensor | None:
    """Add Σⱼ wⱼ (G + sⱼ)^(-1) to ``root`` and return the first of these inverses; None where there is none.

    By Cholesky's factors: halving by blocks costs a little less and loses twice as many digits.
    """
    first = None
    for weight, shift in zip(weights, shifts, strict=True):
        shifted = gram.clone()
        shifted.diagonal().add_(shift)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        del shifted
        if failed.item():
            return None
        resolvent = torch.cholesky_inverse(factor)
        del factor
        root.add_(resolvent, alpha=weight)
        first = resolvent if first is None else first
    return first


def mirror_(A: Tensor) -> Tensor:
    """Copy what is below the diagonal above it, in blocks of rows."""
    for start in range(0, len(A), ROW_BLOCK):
        end = min(start + ROW_BLOCK, len(A))
        A[:start, start:end] = A[start:end, :start].mT
        corner = A[start:end, start:end]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
    return A


def _add_lower_product_(out: Tensor, X: Tensor) -> Tensor:
    """Add X Xᵀ to ``out`` on and below the diagonal; above it there may be anything afterwards."""
    m = len(X)
    if m < 2 * ROW_BLOCK or X.stride(-1) != 1:  # blocks of rows would have to be copied out of columns
        return out.add_(product(X, X.mT))
    for start in range(0, m, ROW_BLOCK):
        end = min(start + ROW_BLOCK, m)
        out[start:end, :end] += product(X[start:end], X[:end].mT)
    return out
