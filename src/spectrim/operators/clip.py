"""Spectral clipping: no singular value of the result exceeds the threshold, and no singular vector turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from ._stack import as_matrices, entry_maximum, per_matrix, working_dtype
from .inverse_root import LEAST_TOL, Solver, check_solver, reference, solve

__all__ = ["Precision", "check_precision", "half_serves", "hard_clip", "soft_clip", "soft_clip_vector"]

Precision = Literal["auto", "exact", "half"]

EXACT_TOL = 1e-3
HALF_TOL = 1e-2


def soft_clip(
    X: Tensor,
    threshold: float | Tensor,
    *,
    precision: Precision = "auto",
    solver: Solver = "auto",
    tol: float | None = None,
    overwrite: bool = False,
) -> Tensor:
    r"""Shrink every singular value σ of X to σ / sqrt(1 + σ²/c²), so that none exceeds the threshold c.

    The exact form is finite for every finite X, and no singular value of it exceeds c by more than 1e-5 of c. It is
    within ``tol`` up to σ₁/c = 1e4 on the CPU, whatever the spectrum, and up to 1e3 where nothing can be read
    (:func:`choose_solver`), whatever torch's switches for matrix products say. Both are meant before the result is
    rounded to X's dtype. A matrix that is not finite gives NaN, and touches no other of its stack.

    Args:
        X: (..., m, n), floating point. Leading dimensions are a stack of independent matrices.
        threshold: c > 0, in the units of X's singular values; a tensor broadcasts over the stack.
        precision: "exact" is to ``tol``; "half" computes products of float16 summed in float32, to 1e-2; "auto" is
            "half" where such products are fast (CUDA and ROCm) unless solver or a smaller tol is given, otherwise
            "exact".
        solver: how (I + XXᵀ/c²)^(-1/2) is computed in the exact form; "auto" follows :func:`choose_solver`.
        tol: relative Frobenius error allowed against the exact result, at least 1e-10; 1e-3 unless given.
        overwrite: X is not needed any more: the result may take its place, which saves its memory.

    Returns:
        A tensor of X's shape and dtype, a new one unless ``overwrite`` is given. X is not written to otherwise.

    Raises:
        ValueError: threshold is not positive, X has fewer than two dimensions, an option is unknown, or ``tol`` is one
            that the solver or precision does not keep.

    Source: arXiv 2603.14315, eq. for H_c. The map is odd, and commutes with transposition.
    """
    check_solver(solver)
    check_precision(precision, solver)
    if tol is not None and solver == "newton_schulz":
        raise ValueError(f"tol={tol} with solver='newton_schulz': expected no tol, for it promises no accuracy")
    least = HALF_TOL if precision == "half" else LEAST_TOL
    if tol is not None and not tol >= least:
        raise ValueError(f"tol={tol} with precision={precision!r}: expected {least} or more")
    explicit = solver != "auto" or (tol is not None and tol < HALF_TOL)
    if half_serves(X, precision) and not (precision == "auto" and explicit):
        return _half_clip(X, threshold, overwrite)
    accuracy = EXACT_TOL if tol is None else tol
    return _clip(X, threshold, lambda Y, c: solve(Y, c, solver, accuracy, overwrite=overwrite))


def hard_clip(X: Tensor, threshold: float | Tensor, *, tol: float = EXACT_TOL) -> Tensor:
    r"""Lower every singular value above the threshold c to c, and leave the others untouched.

    It is computed in float64 from eigenvectors or singular vectors, at any tol: the corner of min(σ, c) defeats
    polynomials and rational functions, and the polar factors it can be written with lose accuracy where σ is near c.
    A matrix that is not finite gives NaN.

    Args:
        X: (..., m, n), floating point. Leading dimensions are a stack of independent matrices.
        threshold: c > 0, in the units of X's singular values; a tensor broadcasts over the stack.
        tol: relative Frobenius error allowed against the exact result, before it is rounded to X's dtype.

    Returns:
        A new tensor of X's shape and dtype.

    Raises:
        ValueError: threshold is not positive, X has fewer than two dimensions, or tol is less than 1e-10.
    """
    if not tol >= LEAST_TOL:
        raise ValueError(f"tol={tol}: expected {LEAST_TOL} or more")
    return _clip(X, threshold, lambda Y, c: reference(Y, c, tol, hard=True))


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
    # In float64, in units of the largest entry, where no square overflows or vanishes.
    unit = entry_maximum(row).double()
    norm = torch.linalg.vector_norm(row / unit, dim=-1, keepdim=True)
    ratio = norm / (c / unit).clamp_min(torch.finfo(torch.float64).tiny)
    return (row / torch.hypot(torch.ones_like(ratio), ratio)).squeeze(-2).to(u.dtype)


def check_precision(precision: str, solver: str) -> None:
    """Raise ValueError unless the precision is known, and agrees with the solver."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision={precision!r}: expected one of {', '.join(map(repr, get_args(Precision)))}")
    if precision == "half" and solver != "auto":
        raise ValueError(f"solver={solver!r} with precision='half': expected precision='exact', or no solver")


def half_serves(X: Tensor, precision: Precision) -> bool:
    """Whether the half-precision form computes X: where it was asked for, and by "auto" on CUDA and ROCm."""
    return precision == "half" or (precision == "auto" and X.device.type == "cuda" and X.dtype != torch.float64)


def _half_clip(X: Tensor, threshold: float | Tensor, overwrite: bool) -> Tensor:
    from .half import half_clip

    Y = as_matrices(X).float()
    c = per_matrix(threshold, Y, "threshold")
    stack = Y.reshape(-1, *Y.shape[-2:])
    (clipped,) = half_clip([stack], [c.expand(*Y.shape[:-2], 1, 1).reshape(-1)], overwrite=overwrite or Y is not X)
    return clipped.view(X.shape).to(X.dtype)


def _clip(X: Tensor, threshold: float | Tensor, clip_wide: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Check the arguments, and clip X or its transpose, whichever is wide, in working precision."""
    Y = as_matrices(X)
    c = per_matrix(threshold, Y, "threshold")
    if X.numel() == 0:
        return X.clone()
    tall = X.shape[-2] > X.shape[-1]
    clipped = clip_wide(Y.mT if tall else Y, c)
    return (clipped.mT if tall else clipped).to(X.dtype)
