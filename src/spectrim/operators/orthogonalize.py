"""The polar factor: every singular value of a matrix set to one, as Muon does with its momentum."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ._product import product
from ._stack import as_matrices, energy, entry_maximum, reading_is_free
from .minimax import minimax_polar, steps_to_reach
from .rational import rational
from .reference import scale_singular_values

__all__ = ["PolarSolver", "orthogonalize"]

PolarSolver = Literal["auto", "reference", "rational", "minimax", "muon"]

MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the published choice of Muon, and the default of torch.optim.Muon
MUON_STEPS = 5
MINIMAX_LOW = 1e-4  # σ/σ₁ from which on the accurate iteration reaches one, with room for its bound on σ₁
ROUGH_LOW = 1e-2  # the same where the caller counts the steps
ROUGH_TOL = 0.2  # of the rational approximation: Muon's own iteration ends between 0.7 and 1.2


def orthogonalize(
    X: Tensor,
    *,
    solver: PolarSolver = "auto",
    steps: int | None = None,
    overwrite: bool = False,
    precision: str = "auto",
) -> Tensor:
    r"""Set every nonzero singular value of X to one.

    Args:
        X: (..., m, n), floating point. Leading dimensions are a stack of independent matrices.
        solver: "reference" is the eigendecomposition of the float64 Gram matrix, right for every spectrum; "minimax"
            iterates the best quintics without reading the device, to 1e-3 where σ_min/σ₁ >= 1e-3; "muon" is the rough
            quintic with torch's coefficients, which leaves singular values between about 0.7 and 1.2; "rational"
            sends σ to σ/√(σ² + c²), with c such that no direction is left below what "muon" makes of it in as many
            steps, give or take a fifth: for CPUs.
            "auto" is "reference" on the CPU and "minimax" elsewhere, or, where steps is given, "rational" and "muon".
        steps: number of steps of the iteration, for a cheap and rough result: five where "muon" or "rational" is asked
            for without.
        overwrite: X is not needed any more: the result may take its place, which saves its memory.

    Returns:
        A tensor of X's shape and dtype, a new one unless ``overwrite`` is given. Directions in which X is zero to
        rounding stay zero.

    Raises:
        ValueError: X has fewer than two dimensions, the solver is unknown, or steps is not positive.

    The map is odd, and commutes with transposition.
    """
    if solver not in get_args(PolarSolver):
        raise ValueError(f"solver={solver!r}: expected one of {', '.join(map(repr, get_args(PolarSolver)))}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps={steps}: expected a positive integer")
    if steps is not None and solver == "reference":
        raise ValueError(f"steps={steps} with solver='reference': expected an iteration, or no steps")
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
        low = MINIMAX_LOW if steps is None else ROUGH_LOW
        polar = minimax_polar(Y, low, steps or steps_to_reach(low))
    else:
        polar = _muon(Y, steps or MUON_STEPS)
    return (polar.mT if tall else polar).to(X.dtype)


def _reference(X: Tensor, overwrite: bool) -> Tensor:
    """Eigendecomposition of the float64 Gram matrix; directions below rounding of the largest are dropped."""

    def gain(sigma: Tensor) -> Tensor:
        floor = X.shape[-1] * torch.finfo(X.dtype).eps * sigma.amax(-1, keepdim=True)
        return torch.where(sigma > floor, 1 / sigma, 0.0)

    return scale_singular_values(X, gain, overwrite=overwrite)


def _rational(X: Tensor, steps: int, overwrite: bool) -> Tensor:
    """σ/√(σ² + c²): the soft clip at c, over c. The slope of Muon's quintic at zero says what its steps lift."""
    low = MUON_COEFFICIENTS[0] ** -steps
    c = (low * energy(X).sqrt()[..., None, None]).to(X.dtype).clamp_min(torch.finfo(X.dtype).tiny)
    clipped = rational(X, c, ROUGH_TOL, overwrite=overwrite)
    return _reference(X, overwrite) if clipped is None else clipped.div_(c)


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
