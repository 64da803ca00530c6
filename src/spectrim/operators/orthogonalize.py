"""The polar factor of a matrix: all singular values become one, as in Muon."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ._product import product
from ._stack import as_matrices, energy, entry_maximum, reading_is_free
from .clip import Precision, check_precision, half_serves
from .inverse_root import solve
from .minimax import minimax_polar
from .rational import POLAR_TOL, polar_root
from .reference import map_singular_values

__all__ = ["PolarSolver", "orthogonalize"]

PolarSolver = Literal["auto", "reference", "rational", "minimax", "muon"]

MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the published choice of Muon, and the default of torch.optim.Muon
MUON_STEPS = 5
ROUGH_TOL = 0.2  # of the rational approximation; Muon's iteration ends between 0.7 and 1.2


def orthogonalize(
    X: Tensor,
    *,
    precision: Precision = "auto",
    solver: PolarSolver = "auto",
    steps: int | None = None,
    overwrite: bool = False,
) -> Tensor:
    r"""Set every nonzero singular value of X to one.

    Args:
        X: (..., m, n), floating point. Leading dimensions are a stack of independent matrices.
        precision: "half" multiplies in float16 with float32 accumulation; "exact" in float32 or float64, whatever
            torch's precision settings are; "auto" is "half" on CUDA and ROCm unless solver is given, otherwise "exact".
        solver: of the exact form. "reference" uses eigenvectors or singular vectors in float64, for every spectrum.
            "minimax" iterates the best quintics without reading the device; its error is 1e-3 if σ_min/σ₁ >= 1e-3.
            "muon" is Muon's quintic with torch's coefficients; singular values end between about 0.7 and 1.2.
            "rational", for CPUs, maps σ to σ/√(σ² + c²), with c such that no singular value is more than about 20 %
            below the result of "muon" with the same steps.
            "auto" is "reference" on the CPU and "minimax" elsewhere; with steps, "rational" and "muon".
        steps: number of steps of the iteration, for a fast and rough result; 5 by default for "muon" and "rational".
        overwrite: the result may be stored in X's memory.

    Returns:
        A tensor of X's shape and dtype, a new one unless ``overwrite`` is given. Singular values that are zero up to
        rounding become zero. A matrix with NaN or infinity gives NaN and does not affect other matrices of the stack.

    Raises:
        ValueError: X has fewer than two dimensions, an option is unknown, steps is not positive, or a solver is given
            for half precision.

    The map is odd and commutes with transposition.
    """
    if solver not in get_args(PolarSolver):
        raise ValueError(f"solver={solver!r}: expected one of {', '.join(map(repr, get_args(PolarSolver)))}")
    check_precision(precision, solver)
    if steps is not None and steps < 1:
        raise ValueError(f"steps={steps}: expected a positive integer")
    if steps is not None and solver == "reference":
        raise ValueError(f"steps={steps} with solver='reference': expected an iterative solver, or no steps")
    if half_serves(X, precision) and solver == "auto":
        return _half_polar(X, steps, overwrite)
    Y = as_matrices(X)
    if X.numel() == 0:
        return X.clone()
    tall = X.shape[-2] > X.shape[-1]
    Y = Y.mT if tall else Y
    if solver == "auto":
        choices: tuple[PolarSolver, PolarSolver] = ("reference", "minimax") if steps is None else ("rational", "muon")
        solver = choices[0] if reading_is_free(X) else choices[1]
    if solver == "reference":
        polar = _reference(Y, overwrite)
    elif solver == "rational":
        polar = _rational(Y, steps or MUON_STEPS, overwrite)
    elif solver == "minimax":
        polar = minimax_polar(Y, steps)
    else:
        polar = _muon(Y, steps or MUON_STEPS)
    return (polar.mT if tall else polar).to(X.dtype)


def _half_polar(X: Tensor, steps: int | None, overwrite: bool) -> Tensor:
    from .half import half_polar

    Y = as_matrices(X).float()
    (polar,) = half_polar([Y.reshape(-1, *Y.shape[-2:])], steps=steps, overwrite=overwrite or Y is not X)
    return polar.view(X.shape).to(X.dtype)


def _reference(X: Tensor, overwrite: bool) -> Tensor:
    """The polar factor in float64; singular values below the rounding of the largest become zero."""
    rounding = X.shape[-1] * torch.finfo(X.dtype).eps
    return map_singular_values(
        X,
        rounding,
        lambda sigma, bend: (sigma > bend).double(),
        tol=POLAR_TOL,
        rescale=False,
        overwrite=overwrite,
        easy=polar_root,
    )


def _rational(X: Tensor, steps: int, overwrite: bool) -> Tensor:
    """σ/√(σ² + c²), the soft clip at c over c. Muon's steps multiply a small σ by the slope of its quintic at zero."""
    low = MUON_COEFFICIENTS[0] ** -steps
    # Relative to the largest entry, so that products with c and its inverse do not underflow.
    unit = entry_maximum(X)
    Y = X.div_(unit) if overwrite else X / unit
    c = (low * energy(Y).sqrt()[..., None, None]).to(X.dtype)
    return solve(Y, c.clamp_min(torch.finfo(X.dtype).tiny), "rational", ROUGH_TOL, overwrite=True).div_(
        c.clamp_min(low)
    )


def _muon(X: Tensor, steps: int) -> Tensor:
    """X ← aX + b(XXᵀ)X + c(XXᵀ)²X from X/‖X‖_F, with fixed coefficients."""
    a, b, c = MUON_COEFFICIENTS
    Y = X / entry_maximum(X)
    norm: Tensor = torch.linalg.matrix_norm(Y, keepdim=True)
    Y = Y / norm.clamp_min(torch.finfo(Y.dtype).tiny)
    for _ in range(steps):
        G = product(Y, Y.mT)
        Y = a * Y + product(b * G + c * product(G, G), Y)
    return Y
