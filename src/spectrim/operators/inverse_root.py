r"""The solvers of (I + X Xᵀ/c²)^(-1/2) X, which is all of soft clipping, and the rule that picks one.

Each takes X (..., m, n) with m <= n in its working precision and c as (..., 1, 1), and returns a new tensor unless it
may overwrite X.

    rational        Zolotarev's rational approximation, poles and precision chosen from κ, which it reads    rational.py
    minimax         best odd quintics on the known interval, coefficients looked up on the device            minimax.py
    reference       eigendecomposition of the float64 Gram matrix: what the others are held against          here
    newton_schulz   the paper's ten coupled steps, to be compared with                                       here
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ._stack import reading_is_free
from .minimax import minimax
from .rational import rational
from .reference import scale_singular_values

__all__ = ["Solver", "check_solver", "choose_solver", "newton_schulz", "reference", "solve"]

Solver = Literal["auto", "rational", "minimax", "reference", "newton_schulz"]

SMALL_SIDE = 64  # up to here an eigendecomposition costs no more than the overhead of anything else
PAPER_STEPS = 10  # arXiv 2603.14315 runs ten coupled steps whatever the matrix


def solve(X: Tensor, c: Tensor, solver: Solver, tol: float, *, overwrite: bool = False) -> Tensor:
    """(I + XXᵀ/c²)^(-1/2) X by the named solver, which may put it in X's place where ``overwrite`` allows it."""
    if solver == "auto":
        solver = choose_solver(X)
    if solver == "minimax":
        return minimax(X, c)
    if solver == "newton_schulz":
        return newton_schulz(X, c)
    result = rational(X, c, tol, overwrite=overwrite) if solver == "rational" else None
    return reference(X, c) if result is None else result


def check_solver(solver: str) -> None:
    """Raise ValueError unless the solver is one of those this module knows."""
    if solver not in get_args(Solver):
        raise ValueError(f"solver={solver!r}: expected one of {', '.join(map(repr, get_args(Solver)))}")


def choose_solver(X: Tensor) -> Solver:
    """The solver that "auto" stands for.

    - Where reading a number would make the host wait, or cannot be done (an accelerator, a compiled graph, fake and
      meta tensors): "minimax", which is a fixed sequence of products.
    - On the CPU, smaller side up to 64: "reference".
    - On the CPU otherwise: "rational", which itself goes from float32 to float64 to the reference as κ demands.
    """
    if not reading_is_free(X):
        return "minimax"
    return "reference" if min(X.shape[-2:]) <= SMALL_SIDE else "rational"


def reference(X: Tensor, c: Tensor, *, hard: bool = False) -> Tensor:
    """Eigendecomposition of the float64 Gram matrix: σ goes to σ / √(1 + σ²/c²), or to min(σ, c) where hard."""
    threshold = c.double()[..., 0]
    larger = torch.maximum if hard else torch.hypot
    return scale_singular_values(X, lambda sigma: 1 / larger(torch.ones_like(sigma), sigma / threshold))


def newton_schulz(X: Tensor, c: Tensor, steps: int = PAPER_STEPS) -> Tensor:
    """The paper's coupled Newton-Schulz iteration, kept to be compared with: inaccurate where σ₁ is far above c.

    Y → A^(1/2) and Z → A^(-1/2) for A = I + XXᵀ/c² over its Frobenius norm. Three products of the small side a step.
    """
    X_over_c = X / c
    eye = torch.eye(X.shape[-2], dtype=X.dtype, device=X.device)
    A = eye + X_over_c @ X_over_c.mT
    norm: Tensor = torch.linalg.matrix_norm(A, keepdim=True)
    Y, Z = A / norm, eye
    for _ in range(steps):
        T = 1.5 * eye - 0.5 * (Z @ Y)
        Y, Z = Y @ T, T @ Z
    return (Z / norm.sqrt()) @ X
