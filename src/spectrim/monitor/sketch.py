"""What a device works out about a matrix without waiting for the host: a few numbers from which the host reads metrics.

Everything here is products, orthogonalisations and reductions, which a device can queue; eigenvalues of the small
matrices that they leave are the host's work (:mod:`metrics`). Starts are fixed numbers, a function of the shape, so no
random state is touched and a run that resumes measures the same.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.operators._stack import energy
from spectrim.operators.spike import start_basis

__all__ = [
    "Entries",
    "entry_statistics",
    "gram_of_singular_values",
    "krylov_gram",
    "krylov_size",
    "lanczos_coefficients",
    "lanczos_shape",
    "wide",
]

#: Columns of a block beyond the rank asked for.
OVERSAMPLING = 4
#: Blocks of a Krylov space, at most; of pure noise they miss 1 % of the norm and 2 % of the spike's energy.
DEPTH = 6
#: Columns of a Krylov space, at most where it has more than two blocks: the host solves an eigenproblem of this size.
WIDTH = 200
#: Starts and steps of the Lanczos iterations from which a share of singular values is estimated.
PROBES, LANCZOS_STEPS = 8, 24
#: Entries that the tail index is read from, at most, and the share of them that counts as the tail.
TAIL_SAMPLE, TAIL_FRACTION = 2**16, 0.01


class Entries(NamedTuple):
    """Of every matrix: the squared norm, the largest absolute entry, and Hill's index of the tail of entries."""

    energy: Tensor
    largest: Tensor
    tail_index: Tensor


def wide(X: Tensor) -> Tensor:
    """X or its transpose, whichever has no more rows than columns; singular values and entries are the same."""
    return X.mT if X.shape[-2] > X.shape[-1] else X


def entry_statistics(X: Tensor, *, fraction: float = TAIL_FRACTION, sample: int | None = TAIL_SAMPLE) -> Entries:
    """Statistics of the entries of (..., m, n), each of shape (...) and in float64.

    Args:
        X: in float32 or float64.
        fraction: of the entries that is the tail.
        sample: how many entries the tail index is read from; None for all.
    """
    flat = (X.mT if X.mT.is_contiguous() else X).flatten(-2)
    low, high = torch.aminmax(flat, dim=-1)
    some = flat if sample is None else flat[..., :: sample_stride(flat.shape[-1], X.shape[-1], sample)]
    count = max(1, math.floor(fraction * some.shape[-1]))
    if some.shape[-1] < 2:
        return Entries(energy(X), torch.maximum(-low, high).double(), torch.full_like(low, math.nan).double())
    ranked = torch.topk(some.abs(), min(count + 1, some.shape[-1]), dim=-1).values.double()
    excess = (ranked[..., :-1] / ranked[..., -1:]).log().mean(-1)
    return Entries(energy(X), torch.maximum(-low, high).double(), 1 / excess)


def sample_stride(entries: int, columns: int, sample: int) -> int:
    """A stride at which at most ``sample`` entries of a matrix, read row by row, come from all its rows and columns."""
    stride = max(1, -(-entries // sample))
    while stride > 1 and math.gcd(stride, columns) > 1:
        stride += 1
    return stride


def krylov_size(rows: int, rank: int) -> tuple[int, int]:
    """Columns of a block, and how many blocks, of the Krylov space for the leading directions of a wide matrix.

    One block of all rows where the space would hold them all.
    """
    block = rank + OVERSAMPLING
    depth = min(DEPTH, max(2, WIDTH // block))
    return (rows, 1) if block * depth >= rows else (block, depth)


def krylov_gram(X: Tensor, rank: int) -> Tensor:
    """A small symmetric matrix whose leading eigenvalues are nearly the squares of the leading singular values of X.

    A block Krylov space [Q₁, …, Q_q] of XXᵀ, Qᵢ = orth(X Xᵀ Qᵢ₋₁), and the Gram matrix of X's part in it. Its
    eigenvalues never exceed the squares that they stand for; with q blocks they are as near as the best polynomial of
    degree q can make them. Of a small matrix it is XXᵀ itself.

    Args:
        X: (..., m, n), m ≤ n, in float32 or float64.
        rank: how many directions matter.

    Returns:
        (..., s, s), s columns in all, in float64.
    """
    rows, columns = X.shape[-2:]
    block, depth = krylov_size(rows, rank)
    if block == rows:
        return gram_of_singular_values(X)
    V = start_basis(columns, block, device=X.device, dtype=X.dtype)
    found = []
    for _ in range(depth):
        found.append(torch.linalg.qr(X @ V).Q)
        V = X.mT @ found[-1]
    part: Tensor = (X.mT @ torch.linalg.qr(torch.cat(found, -1)).Q).double()
    return part.mT @ part


def gram_of_singular_values(X: Tensor) -> Tensor:
    """XXᵀ of a wide matrix in float64: its eigenvalues are the squared singular values."""
    exact: Tensor = X.double()
    return exact @ exact.mT


def lanczos_shape(rows: int) -> tuple[int, int]:
    """Probes and steps of :func:`lanczos_coefficients` for a wide matrix."""
    return min(PROBES, rows), min(LANCZOS_STEPS, rows)


def lanczos_coefficients(X: Tensor) -> Tensor:
    """Lanczos iterations of XXᵀ from several orthonormal starts, for the density of singular values.

    Args:
        X: (..., m, n), m ≤ n, in float32 or float64.

    Returns:
        (..., p, 2, K) in float64: for each start the diagonal of its K x K tridiagonal matrix, and its off-diagonal,
        of which the last entry means nothing.
    """
    rows = X.shape[-2]
    probes, steps = lanczos_shape(rows)
    start = torch.linalg.qr(start_basis(rows, probes, device=X.device, dtype=X.dtype)).Q
    # Vectors as rows, so that every start's iteration is a row of one product.
    v = start.mT.expand(*X.shape[:-2], probes, rows)
    before, beta = torch.zeros_like(v), torch.zeros_like(v[..., :1])
    alphas, betas = [], []
    for _ in range(steps):
        # Not orthogonalised against all vectors so far: converged values come back as ghosts, but share their weight.
        w = (v @ X) @ X.mT - beta * before
        alpha = (v * w).sum(-1, keepdim=True)
        w = w - alpha * v
        beta = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
        before, v = v, w / torch.where(beta > 0, beta, 1.0)
        alphas.append(alpha[..., 0])
        betas.append(beta[..., 0])
    return torch.stack([torch.stack(alphas, -1), torch.stack(betas, -1)], -2).double()
