r"""The solvers of (I + X Xᵀ/c²)^(-1/2) X, the soft clip of X, and the choice of one.

Every solver takes X (..., m, n) with m <= n in its working precision and c (..., 1, 1). It returns a new tensor unless
it may overwrite X.

    rational        Zolotarev's rational approximation; reads κ to choose poles and precision    rational.py
    minimax         best odd quintics on the known interval: products only, reads nothing        minimax.py
    reference       eigenvectors or singular vectors in float64, for every finite matrix         here
    newton_schulz   the paper's ten coupled steps, for comparisons                               here
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ._precision import float32_product
from ._stack import reading_is_free
from .minimax import minimax
from .rational import rational
from .reference import map_singular_values

__all__ = ["LEAST_TOL", "Solver", "check_solver", "choose_solver", "newton_schulz", "reference", "solve"]

Solver = Literal["auto", "rational", "minimax", "reference", "newton_schulz"]

LEAST_TOL = 1e-10  # float64 attains this at σ₁/c = 1e4
SMALL_SIDE = 64  # up to this side, an eigendecomposition takes no longer than other solvers' overhead
PAPER_STEPS = 10  # arXiv 2603.14315 runs ten coupled steps for every matrix


def solve(X: Tensor, c: Tensor, solver: Solver, tol: float, *, overwrite: bool = False) -> Tensor:
    """(I + XXᵀ/c²)^(-1/2) X by the named solver; with ``overwrite``, it may be stored in X's memory."""
    if solver == "auto":
        solver = choose_solver(X)
    if solver == "minimax":
        return minimax(X, c, tol)
    if solver == "newton_schulz":
        return newton_schulz(X, c)
    if solver == "rational":
        return _one_by_one(X, c, tol, overwrite)
    return reference(X, c, tol, overwrite=overwrite)


def check_solver(solver: str) -> None:
    """Raise ValueError if the solver is unknown."""
    if solver not in get_args(Solver):
        raise ValueError(f"solver={solver!r}: expected one of {', '.join(map(repr, get_args(Solver)))}")


def choose_solver(X: Tensor) -> Solver:
    """The solver that "auto" selects.

    - On an accelerator, in a compiled graph, and for fake and meta tensors, where the host should not or cannot read
      numbers: "minimax", a fixed sequence of products.
    - On the CPU with a smaller side up to 64: "reference".
    - On the CPU otherwise: "rational", which uses float32, float64 or the reference, depending on κ.
    """
    if not reading_is_free(X):
        return "minimax"
    return "reference" if min(X.shape[-2:]) <= SMALL_SIDE else "rational"


def _one_by_one(X: Tensor, c: Tensor, tol: float, overwrite: bool) -> Tensor:
    """The rational solver, or else the reference, for every matrix of a stack."""
    out = X if overwrite else torch.empty_like(X)
    thresholds = _matrices(c.expand(*X.shape[:-2], 1, 1))
    for matrix, place, threshold in zip(_matrices(X), _matrices(out), thresholds, strict=True):
        clipped = rational(matrix, threshold.item(), tol, overwrite=overwrite)
        if clipped is None:
            clipped = reference(matrix, threshold, tol)
        if clipped is not place:
            place.copy_(clipped)
    return out


def _matrices(stack: Tensor) -> tuple[Tensor, ...]:
    return (stack,) if stack.ndim == 2 else stack.flatten(0, -3).unbind()


def reference(X: Tensor, c: Tensor, tol: float, *, hard: bool = False, overwrite: bool = False) -> Tensor:
    """Map σ to σ / √(1 + σ²/c²), or to min(σ, c) if hard, in float64 by eigenvectors or singular vectors."""
    threshold = c.double()[..., 0].expand(*X.shape[:-2], 1).reshape(-1, 1)

    def image(sigma: Tensor, bend: Tensor) -> Tensor:
        less = torch.minimum(sigma, bend)
        if hard:
            return less
        more = torch.maximum(sigma, bend).clamp_min(torch.finfo(torch.float64).tiny)
        return less / torch.hypot(torch.ones_like(less), less / more)

    return map_singular_values(X, threshold, image, tol, overwrite=overwrite)


def newton_schulz(X: Tensor, c: Tensor, steps: int = PAPER_STEPS) -> Tensor:
    """The paper's coupled Newton-Schulz iteration, for comparisons: inaccurate if σ₁ is far above c.

    Y → A^(1/2) and Z → A^(-1/2) for A = I + XXᵀ/c² over its Frobenius norm, with three products of small matrices per
    step.
    """
    X_over_c = X / c
    eye = torch.eye(X.shape[-2], dtype=X.dtype, device=X.device)
    A = eye + float32_product(X_over_c, X_over_c.mT)
    norm: Tensor = torch.linalg.matrix_norm(A, keepdim=True)
    Y, Z = A / norm, eye.expand_as(A)
    for _ in range(steps):
        T = 1.5 * eye - 0.5 * float32_product(Z, Y)
        Y, Z = float32_product(Y, T), float32_product(T, Z)
    return float32_product(Z / norm.sqrt(), X)
