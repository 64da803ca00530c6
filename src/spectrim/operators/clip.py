"""Spectral clipping: no singular value of the result exceeds the threshold, and no singular vector turns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._stack import as_matrices, per_matrix, working_dtype
from .inverse_root import Solver, check_solver, reference, solve

__all__ = ["hard_clip", "soft_clip", "soft_clip_vector"]


def soft_clip(
    X: Tensor,
    threshold: float | Tensor,
    *,
    solver: Solver = "auto",
    tol: float = 1e-3,
    overwrite: bool = False,
    precision: str = "auto",
) -> Tensor:
    r"""Shrink every singular value σ of X to σ / sqrt(1 + σ²/c²), so that none exceeds the threshold c.

    Args:
        X: (..., m, n), floating point. Leading dimensions are a stack of independent matrices.
        threshold: c > 0, in the units of X's singular values; a tensor broadcasts over the stack and is not read.
        solver: how (I + XXᵀ/c²)^(-1/2) is computed; "auto" follows :func:`choose_solver`.
        tol: relative Frobenius error allowed against the exact result.
        overwrite: X is not needed any more: the result may take its place, which saves its memory.

    Returns:
        A tensor of X's shape and dtype, a new one unless ``overwrite`` is given. X is not written to otherwise.

    Raises:
        ValueError: threshold is not positive, X has fewer than two dimensions, or the solver is unknown.

    Source: arXiv 2603.14315, eq. for H_c. The map is odd, and commutes with transposition.
    """
    check_solver(solver)
    return _clip(X, threshold, tol, lambda Y, c: solve(Y, c, solver, tol, overwrite=overwrite))


def hard_clip(X: Tensor, threshold: float | Tensor, *, tol: float = 1e-3) -> Tensor:
    r"""Lower every singular value above the threshold c to c, and leave the others untouched.

    It is computed from the eigendecomposition of the float64 Gram matrix, at any tol: the corner of min(σ, c) defeats
    polynomials and rational functions, and the polar factors it can be written with lose accuracy where σ is near c.

    Args:
        X: (..., m, n), floating point. Leading dimensions are a stack of independent matrices.
        threshold: c > 0, in the units of X's singular values; a tensor broadcasts over the stack and is not read.
        tol: relative Frobenius error allowed against the exact result.

    Returns:
        A new tensor of X's shape and dtype.

    Raises:
        ValueError: threshold is not positive, X has fewer than two dimensions, or tol is not positive.
    """
    return _clip(X, threshold, tol, lambda Y, c: reference(Y, c, hard=True))


def soft_clip_vector(u: Tensor, threshold: float | Tensor) -> Tensor:
    """Shrink u to u / sqrt(1 + ‖u‖²/c²), the soft clip of a one-column matrix: its norm stays below the threshold c.

    Args:
        u: (..., n), floating point. Leading dimensions are a stack of independent vectors.
        threshold: c > 0; a tensor broadcasts over the stack and is not read.

    Returns:
        A new tensor of u's shape and dtype.
    """
    if u.ndim < 1 or not u.is_floating_point():
        raise ValueError(f"u has shape {tuple(u.shape)} and dtype {u.dtype}: expected floating-point vectors, (..., n)")
    row = u.to(working_dtype(u)).unsqueeze(-2)
    c = per_matrix(threshold, row, "threshold")
    # The norm in float64: its square overflows float32 where the entries do not.
    norm = torch.linalg.vector_norm(row, dim=-1, keepdim=True, dtype=torch.float64)
    return (row / torch.hypot(torch.ones_like(norm), norm / c)).squeeze(-2).to(u.dtype)


def _clip(X: Tensor, threshold: float | Tensor, tol: float, clip_wide: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Check the arguments, and clip X or its transpose, whichever is wide, in working precision."""
    if not tol > 0:
        raise ValueError(f"tol={tol}: expected a positive number")
    Y = as_matrices(X)
    c = per_matrix(threshold, Y, "threshold")
    if X.numel() == 0:
        return X.clone()
    tall = X.shape[-2] > X.shape[-1]
    clipped = clip_wide(Y.mT if tall else Y, c)
    return (clipped.mT if tall else clipped).to(X.dtype)
