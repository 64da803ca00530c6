"""Symmetric matrices on the host: Gram matrices, sums of inverses, and an embedding that sets a spike apart.

The caller holds :func:`~spectrim.operators._precision.true_float32` around all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._product import multiply

__all__ = ["COLUMN_BLOCK", "LEAF", "Embedding", "add_resolvent_", "gram_matrix", "inverse", "inverse_by_halves_"]

ROW_BLOCK = 256  # rows of a symmetric product that are computed at a time
LEAF = 256  # rows up to which a matrix is inverted by Cholesky's factors alone
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
        embedded[:k] = multiply(self.Q.mT, X)
        torch.sub(X, multiply(self.Q, embedded[:k]), out=embedded[k:])
        return embedded

    def fold(self, Z: Tensor) -> Tensor:
        """Q top + (I − QQᵀ) rest for Z = [top; rest], what undoes :meth:`apply`. Writes to Z."""
        k = self.Q.shape[-1]
        top, rest = Z[:k], Z[k:]
        return rest.add_(multiply(self.Q, top - multiply(self.Q.mT, rest)))


def gram_matrix(X: Tensor, c: float, embedding: Embedding | None = None) -> Tensor:
    """Z Zᵀ for Z = X/c, embedded or not, of a matrix X (m, n)."""
    m = len(X) if embedding is None else len(X) + embedding.Q.shape[-1]
    gram: Tensor | None = None
    for columns in torch.split(X, COLUMN_BLOCK, dim=-1):
        if not columns.mT.is_contiguous():
            columns = columns.contiguous()  # products of strided columns are slow
        Z = columns / c if embedding is None else embedding.apply(columns).div_(c)
        if m >= 2 * ROW_BLOCK and Z.stride(-1) == 1:  # blocks of rows would have to be copied out of columns
            gram = _add_lower_product_(X.new_zeros(m, m) if gram is None else gram, Z)
        else:
            square = multiply(Z, Z.mT)
            square = square if square.is_contiguous() else square.mT
            gram = square if gram is None else gram.add_(square)
    assert gram is not None
    return gram if m < 2 * ROW_BLOCK else mirror_(gram)


def add_resolvent_(root: Tensor, gram: Tensor, weight: float, shift: float, *, by_halves: bool) -> Tensor | None:
    """Add w (G + s)^(-1) to ``root`` and return the inverse; None where rounding leaves none."""
    shifted = gram.clone()
    shifted.diagonal().add_(shift)
    resolvent = inverse_by_halves_(shifted) if by_halves else inverse(shifted)
    if resolvent is not None:
        root.add_(resolvent, alpha=weight)
    return resolvent


def inverse(A: Tensor) -> Tensor | None:
    """The inverse of a symmetric matrix by Cholesky's factors; None where rounding leaves it not positive definite."""
    factor, failed = torch.linalg.cholesky_ex(A)
    return None if failed.item() else torch.cholesky_inverse(factor)


def inverse_by_halves_(A: Tensor, leaf: int = LEAF) -> Tensor | None:
    """:func:`inverse` in place by recursive halving: all but products, and an error of eps κ² in place of eps κ."""
    if len(A) <= leaf:
        found = inverse(A)
        return None if found is None else A.copy_(found)
    h = len(A) // 2
    first, coupling, second = A[:h, :h], A[h:, :h], A[h:, h:]
    if inverse_by_halves_(first, leaf) is None:
        return None
    left = multiply(coupling, first)
    second -= multiply(left, coupling.mT)
    if inverse_by_halves_(second, leaf) is None:
        return None
    corner = multiply(second, left)
    first += multiply(left.mT, corner)
    A[h:, :h] = -corner
    A[:h, h:] = A[h:, :h].mT
    return A


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
    for start in range(0, len(X), ROW_BLOCK):
        end = min(start + ROW_BLOCK, len(X))
        out[start:end, :end] += multiply(X[start:end], X[:end].mT)
    return out
