"""Symmetric matrices on the host: Gram matrices, sums of inverses, and products that are known to be symmetric.

What of it costs most is done by kernels where there are any (spectrim/native); the forms in torch's words are here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._product import product

__all__ = ["Reflector", "add_resolvents_", "gram_matrix", "inverse_", "mirror_", "reflect"]

ROW_BLOCK = 256  # rows of a symmetric product that are computed at a time
COLUMN_BLOCK = 1024  # columns that are worked on at a time, so that no second copy of X is ever held
KERNEL_SIDE = 128  # from which side on a kernel, which works on blocks of 64, gains
KERNEL_RANGE = (1e-30, 1e30)  # of numbers whose inverse is as good a factor

#: V and T of a reflection H = I − V T Vᵀ.
Reflector = tuple[Tensor, Tensor]


def gram_matrix(X: Tensor, c: Tensor, reflector: Reflector | None = None) -> Tensor:
    """Z Zᵀ for Z = X/c, or its reflection HX/c, of every matrix of X (..., m, n), with c (..., 1, 1)."""
    gram = X.new_zeros(*X.shape[:-1], X.shape[-2])
    for columns in torch.split(X, COLUMN_BLOCK, dim=-1):
        _add_lower_product_(gram, _scaled(columns, c, reflector))
    return mirror_(gram)


def _scaled(columns: Tensor, c: Tensor, reflector: Reflector | None) -> Tensor:
    if not columns.mT.is_contiguous():
        columns = columns.contiguous()  # products of strided columns are slow
    return columns / c if reflector is None else reflect(columns, reflector).div_(c)


def add_resolvents_(
    root: Tensor, gram: Tensor, weights: Sequence[Sequence[float]], shifts: Sequence[Sequence[float]]
) -> tuple[Tensor, Tensor]:
    """Add Σⱼ wⱼ (G + sⱼ)^(-1) to ``root``, on and below the diagonal, for every G of a stack (..., n, n).

    Args:
        weights, shifts: for every matrix of the stack, flattened, its wⱼ and sⱼ.

    Returns:
        ‖R‖_F of each first inverse R, and tr G R; both of shape (...).
    """
    stack = gram.shape[:-2]
    sizes = None
    for w, s in zip(gram.new_tensor(weights).T, gram.new_tensor(shifts).T, strict=True):
        shifted = gram.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(s.view(*stack, 1))
        resolvent = inverse_(shifted)
        if sizes is None:
            # No product of entries in memory.
            inner = gram.flatten(-2)[..., None, :] @ resolvent.flatten(-2)[..., :, None]
            sizes = torch.linalg.matrix_norm(resolvent), inner[..., 0, 0]
        root.addcmul_(resolvent, w.view(*stack, 1, 1))
        del resolvent, shifted  # before the next is made
    assert sizes is not None
    return sizes


def inverse_(A: Tensor, leaf: int = 192) -> Tensor:
    """Invert a stack of symmetric positive definite matrices in place by recursive halving: mostly products."""
    n = A.shape[-1]
    if n <= leaf:
        return A.copy_(torch.cholesky_inverse(torch.linalg.cholesky_ex(A).L))
    h = n // 2
    first, coupling, second = A[..., :h, :h], A[..., h:, :h], A[..., h:, h:]
    inverse_(first, leaf)
    left = product(coupling, first)
    second -= product(left, coupling.mT)
    inverse_(second, leaf)
    corner = product(second, left)
    first += product(left.mT, corner)
    A[..., h:, :h] = -corner
    A[..., :h, h:] = A[..., h:, :h].mT
    return A


def reflect(X: Tensor, reflector: Reflector) -> Tensor:
    """H X for a reflection, which is its own inverse."""
    V, T = reflector
    turned = product(V, T @ product(V.mT, X))
    return torch.sub(X, turned, out=turned)


def mirror_(A: Tensor) -> Tensor:
    """Copy what is below the diagonal above it, in blocks of rows."""
    m = A.shape[-1]
    for start in range(0, m, ROW_BLOCK):
        end = min(start + ROW_BLOCK, m)
        A[..., :start, start:end] = A[..., start:end, :start].mT
        corner = A[..., start:end, start:end]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
    return A


def _add_lower_product_(out: Tensor, X: Tensor) -> Tensor:
    """Add X Xᵀ to ``out`` on and below the diagonal; above it there may be anything afterwards."""
    m = X.shape[-2]
    if m < 2 * ROW_BLOCK or X.stride(-1) != 1:  # blocks of rows would have to be copied out of columns
        return out.add_(product(X, X.mT))
    for start in range(0, m, ROW_BLOCK):
        end = min(start + ROW_BLOCK, m)
        out[..., start:end, :end] += product(X[..., start:end, :], X[..., :end, :].mT)
    return out


def _each(stack: Tensor) -> Sequence[Tensor]:
    return [stack] if stack.ndim == 2 else stack.flatten(0, -3).unbind()


def _stacked(matrices: Sequence[Tensor], stack: Sequence[int]) -> Tensor:
    whole = torch.stack(list(matrices)) if len(matrices) > 1 else matrices[0].unsqueeze(0)
    return whole.view(*stack, *whole.shape[-2:])
