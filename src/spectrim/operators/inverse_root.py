r"""The solvers of (I + X Xᵀ/c²)^(-1/2) X, which is all of soft clipping.

Each solver takes X (..., m, n) with m <= n in its working precision and c as (..., 1, 1), and returns a new tensor.
:func:`choose_solver` picks one; ``clip.py`` is what calls them.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ._stack import entry_maximum

__all__ = ["Solver", "check_solver", "choose_solver", "newton_schulz", "reference", "solve"]

Solver = Literal["auto", "reference", "newton_schulz"]

PAPER_STEPS = 10  # arXiv 2603.14315 runs ten coupled steps whatever the matrix


def solve(X: Tensor, c: Tensor, solver: Solver, tol: float) -> Tensor:
    """(I + XXᵀ/c²)^(-1/2) X by the named solver."""
    if solver == "auto":
        solver = choose_solver(X, c, tol)
    return newton_schulz(X, c) if solver == "newton_schulz" else reference(X, c)


def check_solver(solver: str) -> None:
    """Raise ValueError unless the solver is one of those this module knows."""
    if solver not in get_args(Solver):
        raise ValueError(f"solver={solver!r}: expected one of {', '.join(map(repr, get_args(Solver)))}")


def choose_solver(X: Tensor, c: Tensor, tol: float) -> Solver:
    """The solver that reaches tol on this matrix."""
    return "reference"


def reference(X: Tensor, c: Tensor) -> Tensor:
    """Eigendecomposition of the float64 Gram matrix: right for every spectrum, and the slowest.

    Singular values are read from the rows of QᵀX, not from the eigenvalues, which know only their squares.
    """
    scale = entry_maximum(X).double()
    Y = X.double() / scale
    Q: Tensor = torch.linalg.eigh(Y @ Y.mT).eigenvectors
    rows = Q.mT @ Y
    sigma = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return (Q @ (rows / torch.hypot(1 / scale, sigma / c.double()))).to(X.dtype)


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
