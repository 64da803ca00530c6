"""Symmetric matrices on the CPU: Gram matrices, inverses, and an embedding that separates a spike.

The caller enters :func:`~spectrim.operators._precision.true_float32`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._product import multiply

__all__ = ["COLUMN_BLOCK", "LEAF", "Embedding", "add_resolvent_", "gram_matrix", "inverse", "inverse_by_halves_"]

ROW_BLOCK = 256  # rows of a symmetric product that are computed at a time
LEAF = 256  # the largest matrix whose inverse is computed by Cholesky factorisation alone
COLUMN_BLOCK = 1024  # columns of X that are processed at a time, to avoid a copy of X


class Embedding(NamedTuple):
    """The isometry X ↦ [QᵀX; X − QQᵀX] for Q (m, k) with orthonormal columns.

    Folding a function of the embedded matrix's Gram matrix gives the function of X Xᵀ; but X's part in the span of Q
    has rows of its own.
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
        """Q top + (I − QQᵀ) rest for Z = [top; rest]: the inverse of :meth:`apply`. Overwrites Z."""
        k = self.Q.shape[-1]
        top, rest = Z[:k], Z[k:]
        return rest.add_(multiply(self.Q, top - multiply(self.Q.mT, rest)))


def gram_matrix(X: Tensor, c: float, embedding: Embedding | None = None) -> Tensor:
    """Z Zᵀ for Z = X/c, or its embedding, of a matrix X (m, n)."""
    m = len(X) if embedding is None else len(X) + embedding.Q.shape[-1]
    gram: Tensor | None = None
    for columns in torch.split(X, COLUMN_BLOCK, dim=-1):
        if not columns.mT.is_contiguous():
            columns = columns.contiguous()  # products of strided columns are slow
        Z = columns / c if embedding is None else embedding.apply(columns).div_(c)
        if m >= 2 * ROW_BLOCK and Z.stride(-1) == 1:  # in column-major memory, blocks of rows would be copied
            gram = _add_lower_product_(X.new_zeros(m, m) if gram is None else gram, Z)
        else:
            square = multiply(Z, Z.mT)
            square = square if square.is_contiguous() else square.mT
            gram = square if gram is None else gram.add_(square)
    assert gram is not None
    return gram if m < 2 * ROW_BLOCK else mirror_(gram)


def add_resolvent_(root: Tensor, gram: Tensor, weight: float, shift: float, *, by_halves: bool) -> Tensor | None:
    """Add w (G + s)^(-1) to ``root`` and return the inverse; None if it does not exist after rounding."""
    shifted = gram.clone()
    shifted.diagonal().add_(shift)
    resolvent = inverse_by_halves_(shifted) if by_halves else inverse(shifted)
    if resolvent is not None:
        root.add_(resolvent, alpha=weight)
    return resolvent


def inverse(A: Tensor) -> Tensor | None:
    """The inverse of a symmetric matrix by Cholesky factorisation; None if it is not positive definite."""
    factor, failed = torch.linalg.cholesky_ex(A)
    return None if failed.item() else torch.cholesky_inverse(factor)


def inverse_by_halves_(A: Tensor, leaf: int = LEAF) -> Tensor | None:
    """:func:`inverse` in place by recursive 2 x 2 blocks: mostly products; the error is eps κ² instead of eps κ."""
    if len(A) <= leaf:
        result = inverse(A)
        return None if result is None else A.copy_(result)
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
    """Copy the lower triangle to the upper one, in blocks of rows."""
    for start in range(0, len(A), ROW_BLOCK):
        end = min(start + ROW_BLOCK, len(A))
        A[:start, start:end] = A[start:end, :start].mT
        corner = A[start:end, start:end]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
    return A


def _add_lower_product_(out: Tensor, X: Tensor) -> Tensor:
    """Add X Xᵀ to the lower triangle of ``out``; the upper one is undefined afterwards."""
    for start in range(0, len(X), ROW_BLOCK):
        end = min(start + ROW_BLOCK, len(X))
        out[start:end, :end] += multiply(X[start:end], X[:end].mT)
    return out
