"""Spectral clipping: bounds the singular values of a matrix and keeps its singular vectors."""

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

    Accuracy of the exact form, before the result is rounded to X's dtype: it is finite for every finite X; no singular
    value exceeds c by more than 1e-5 c; the error is within ``tol`` for σ₁/c up to 1e4 on the CPU and up to 1e3 on
    accelerators and in compiled graphs (:func:`choose_solver`), for every spectrum and all of torch's precision
    settings. A matrix with NaN or infinity gives NaN and does not affect other matrices of the stack.

    Args:
        X: (..., m, n), floating point. Leading dimensions are a stack of independent matrices.
        threshold: c > 0, in the units of X's singular values; a tensor broadcasts over the stack.
        precision: "exact" has an error of at most ``tol``; "half" multiplies in float16 with float32 accumulation, with
            an error of at most 1e-2; "auto" is "half" on CUDA and ROCm unless solver or a tol below 1e-2 is given,
            otherwise "exact".
        solver: how (I + XXᵀ/c²)^(-1/2) is computed in the exact form; "auto" follows :func:`choose_solver`.
        tol: the largest relative Frobenius error, at least 1e-10; 1e-3 by default.
        overwrite: the result may be stored in X's memory.

    Returns:
        A tensor of X's shape and dtype, a new one unless ``overwrite`` is given.

    Raises:
        ValueError: threshold is not positive, X has fewer than two dimensions, an option is unknown, or the solver or
            precision does not support ``tol``.

    Source: arXiv 2603.14315, eq. for H_c. The map is odd and commutes with transposition.
    """
    check_solver(solver)
    check_precision(precision, solver)
    if tol is not None and solver == "newton_schulz":
        raise ValueError(
            f"tol={tol} with solver='newton_schulz': expected no tol, since this solver has no error bound"
        )
    least = HALF_TOL if precision == "half" else LEAST_TOL
    if tol is not None and not tol >= least:
        raise ValueError(f"tol={tol} with precision={precision!r}: expected {least} or more")
    explicit = solver != "auto" or (tol is not None and tol < HALF_TOL)
    if half_serves(X, precision) and not (precision == "auto" and explicit):
        return _half_clip(X, threshold, overwrite)
    accuracy = EXACT_TOL if tol is None else tol
    return _clip(X, threshold, lambda Y, c: solve(Y, c, solver, accuracy, overwrite=overwrite))


def hard_clip(X: Tensor, threshold: float | Tensor, *, tol: float = EXACT_TOL) -> Tensor:
    r"""Lower every singular value above the threshold c to c, and keep the others.

    Always computed in float64 from eigenvectors or singular vectors: polynomials and rational functions approximate
    the kink of min(σ, c) badly, and formulas by polar factors lose accuracy for σ near c. A matrix with NaN or infinity
    gives NaN.

    Args:
        X: (..., m, n), floating point. Leading dimensions are a stack of independent matrices.
        threshold: c > 0, in the units of X's singular values; a tensor broadcasts over the stack.
        tol: the largest relative Frobenius error, before the result is rounded to X's dtype.

    Returns:
        A new tensor of X's shape and dtype.

    Raises:
        ValueError: threshold is not positive, X has fewer than two dimensions, or tol is less than 1e-10.
    """
    if not tol >= LEAST_TOL:
        raise ValueError(f"tol={tol}: expected {LEAST_TOL} or more")
    return _clip(X, threshold, lambda Y, c: reference(Y, c, tol, hard=True))


def soft_clip_vector(u: Tensor, threshold: float | Tensor) -> Tensor:
    """Shrink u to u / sqrt(1 + ‖u‖²/c²), whose norm is below the threshold c: the soft clip of a one-column matrix.

    Args:
        u: (..., n), floating point. Leading dimensions are a stack of independent vectors.
        threshold: c > 0; a tensor broadcasts over the stack and is not checked.

    Returns:
        A new tensor of u's shape and dtype.
    """
    if u.ndim < 1 or not u.is_floating_point():
        raise ValueError(f"u has shape {tuple(u.shape)} and dtype {u.dtype}: expected floating-point vectors, (..., n)")
    row = u.to(working_dtype(u)).unsqueeze(-2)
    c = per_matrix(threshold, row, "threshold")
    # In float64 and relative to the largest entry, so that no square overflows or underflows.
    unit = entry_maximum(row).double()
    norm = torch.linalg.vector_norm(row / unit, dim=-1, keepdim=True)
    ratio = norm / (c / unit).clamp_min(torch.finfo(torch.float64).tiny)
    return (row / torch.hypot(torch.ones_like(ratio), ratio)).squeeze(-2).to(u.dtype)


def check_precision(precision: str, solver: str) -> None:
    """Raise ValueError if the precision is unknown or does not support the solver."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision={precision!r}: expected one of {', '.join(map(repr, get_args(Precision)))}")
    if precision == "half" and solver != "auto":
        raise ValueError(f"solver={solver!r} with precision='half': expected precision='exact', or no solver")


def half_serves(X: Tensor, precision: Precision) -> bool:
    """True if X is computed in half precision: for "half", and for "auto" on CUDA and ROCm."""
    return precision == "half" or (precision == "auto" and X.device.type == "cuda" and X.dtype != torch.float64)


def _half_clip(X: Tensor, threshold: float | Tensor, overwrite: bool) -> Tensor:
    from .half import half_clip

    Y = as_matrices(X).float()
    c = per_matrix(threshold, Y, "threshold")
    stack = Y.reshape(-1, *Y.shape[-2:])
    (clipped,) = half_clip([stack], [c.expand(*Y.shape[:-2], 1, 1).reshape(-1)], overwrite=overwrite or Y is not X)
    return clipped.view(X.shape).to(X.dtype)


def _clip(X: Tensor, threshold: float | Tensor, clip_wide: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Check the arguments, and clip the wide one of X and its transpose in working precision."""
    Y = as_matrices(X)
    c = per_matrix(threshold, Y, "threshold")
    if X.numel() == 0:
        return X.clone()
    tall = X.shape[-2] > X.shape[-1]
    clipped = clip_wide(Y.mT if tall else Y, c)
    return (clipped.mT if tall else clipped).to(X.dtype)
