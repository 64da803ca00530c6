"""Sketches of matrices: a few numbers, computed on the device, from which the host computes metrics (:mod:`metrics`).

Sketches use only products, small Cholesky factors and reductions, for which the host need not wait; the host computes
eigenvalues of small matrices. Starting vectors are fixed numbers that depend on the shape, so that no random state
changes and a resumed run measures the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from spectrim.operators._constants import cached
from spectrim.operators.spike import start_basis

__all__ = [
    "entry_statistics",
    "gram_of_singular_values",
    "krylov_columns",
    "krylov_grams",
    "lanczos_coefficients",
    "sample_stride",
    "wide",
]

#: Columns of a block in addition to the rank.
OVERSAMPLING = 4
#: The most blocks of a Krylov space. For pure noise, they underestimate the norm by 1 % and the spike's energy by 2 %.
DEPTH = 6
#: The most columns of a Krylov space with more than two blocks; the host solves an eigenproblem of this size.
WIDTH = 200
#: The most columns of a Krylov space that goes to the host. Larger ones are first reduced to the leading eigenvalues,
#: since the host needs ten times longer for 72 columns than for 32.
SMALL = 32
#: Subspace iterations of this reduction, of two products each.
SHRINKING = 4
#: Starts and steps of the Lanczos iterations for a share of singular values. More steps gain little, since the variance
#: of the starts remains.
PROBES, LANCZOS_STEPS = 8, 14
#: Added to the unit diagonal of the Gram matrix of a Krylov basis, in float64. It suppresses directions that float32
#: cannot resolve, so that an estimate exceeds its singular value by rounding only.
INDEPENDENT = 1e-7
#: Relative shift of a block's Gram matrix, in float64, which makes its Cholesky factor exist.
SHIFT = 1e-14
#: The most entries for the tail index, and the share of them that forms the tail.
TAIL_SAMPLE, TAIL_FRACTION = 2**16, 0.01


def wide(X: Tensor) -> Tensor:
    """X or its transpose, whichever has no more rows than columns; singular values and entries are the same."""
    return X.mT if X.shape[-2] > X.shape[-1] else X


def entry_statistics(X: Tensor, sample: int | None) -> tuple[Tensor, Tensor]:
    """The largest absolute entry of every matrix of (E, m, n), and Hill's tail index of its entries, in float64.

    The tail index is Hill's estimate of α in P(|x| > t) ~ t^−α from the largest 1 % of the entries: 1 for a Cauchy
    distribution, about 8 for a Gaussian; NaN for a single entry.

    Args:
        X: in float32 or float64.
        sample: number of entries for the tail index; None for all.
    """
    flat = (X.mT if X.mT.is_contiguous() else X).flatten(-2)
    # aminmax is ten times slower on the host.
    largest = torch.maximum(-flat.amin(-1), flat.amax(-1)).double()
    some = flat if sample is None else flat[..., :: sample_stride(flat.shape[-1], X.shape[-1], sample)]
    if some.shape[-1] < 2:
        return largest, torch.full_like(largest, math.nan)
    count = max(1, math.floor(TAIL_FRACTION * some.shape[-1]))
    ranked = torch.topk(some.abs(), min(count + 1, some.shape[-1]), dim=-1).values.double()
    return largest, 1 / (ranked[..., :-1] / ranked[..., -1:]).log().mean(-1)


def sample_stride(entries: int, columns: int, sample: int) -> int:
    """A stride that takes at most ``sample`` entries, in row order, from all rows and columns of a matrix."""
    stride = max(1, -(-entries // sample))
    while stride > 1 and math.gcd(stride, columns) > 1:
        stride += 1
    return stride


def _krylov_size(rows: int, rank: int) -> tuple[int, int]:
    """Columns of a block, and number of blocks, of the Krylov space of a wide matrix.

    It is one block of all rows if the space would be as large.
    """
    block = rank + OVERSAMPLING
    depth = min(DEPTH, max(2, WIDTH // block))
    return (rows, 1) if block * depth >= rows else (block, depth)


def krylov_columns(rows: int, rank: int) -> int:
    """The size of the matrices of :func:`krylov_grams`."""
    block, depth = _krylov_size(rows, rank)
    return min(block * depth, max(SMALL, 2 * block))


def krylov_grams(stacks: Sequence[Tensor], rank: int, energies: Tensor) -> Tensor:
    """Small symmetric matrices whose leading eigenvalues are nearly the squares of the leading singular values.

    Each is the Gram matrix of a matrix X projected on a block Krylov space [Q₁, …, Q_q] of XXᵀ, Qᵢ = orth(X Xᵀ Qᵢ₋₁).
    Its eigenvalues never exceed the squares that they approximate. For a small matrix it is XXᵀ itself. Only the
    products with X are computed for each stack, all else in one batch.

    Args:
        stacks: (Eᵢ, m, nᵢ), m ≤ nᵢ, all in float32 or all in float64.
        rank: number of leading singular values.
        energies: ‖X‖_F² of every matrix, (ΣEᵢ), in float64.

    Returns:
        (ΣEᵢ, s, s) in float64, with s from :func:`krylov_columns`.
    """
    rows = stacks[0].shape[-2]
    block, depth = _krylov_size(rows, rank)
    if block == rows:
        return torch.cat([gram_of_singular_values(X) for X in stacks])
    counts = [len(X) for X in stacks]
    # Vectors are rows, which makes thin products much faster.
    starts = [_start(X.shape[-1], block, X).expand(len(X), block, X.shape[-1]) for X in stacks]
    # Subtracting the mean eigenvalue from XXᵀ keeps the Krylov space, but makes its blocks more independent for noise.
    mean = (energies / rows).to(stacks[0].dtype)[..., None, None]
    basis: list[Tensor] = []
    images = [starts]
    for _ in range(depth):
        W = torch.cat([V @ X.mT for V, X in zip(images[-1], stacks, strict=True)])
        basis.append(_orthonormal_rows(torch.addcmul(W, mean, basis[-1], value=-1) if basis else W))
        images.append([Q @ X for Q, X in zip(torch.split(basis[-1], counts), stacks, strict=True)])
    wholes = [torch.cat(of_one, -2).double() for of_one in zip(*images[1:], strict=True)]
    B, gram = torch.cat(basis, -2).double(), torch.cat([Y @ Y.mT for Y in wholes])
    # With L Lᵀ = B Bᵀ, the rows of L⁻¹B are orthonormal, and L⁻¹Y is the projection of X.
    L = torch.linalg.cholesky_ex(B @ B.mT + _constant("independent", B.shape[-2], B)).L
    half = torch.linalg.solve_triangular(L, gram, upper=False)
    found: Tensor = torch.linalg.solve_triangular(L, half.mT, upper=False)
    size = krylov_columns(rows, rank)
    return found if size == found.shape[-1] else _leading_part(found, size)


def _leading_part(T: Tensor, size: int) -> Tensor:
    """Reduce T, (..., s, s) in float64, to a matrix of this size with its leading eigenvalues, by subspace iterations.

    Few iterations suffice, since twice the columns of a block leave a gap below the leading eigenvalues. They start
    from the last columns of T, which belong to the blocks closest to the leading directions.
    """
    # The fourth power of small gradients would underflow.
    unit = T / T.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(1e-300)[..., None, None]
    square = unit @ unit
    # Rows equal columns, since T is symmetric.
    Z = unit[..., -size:, :]
    for _ in range(SHRINKING):
        Z = _orthonormal_rows(Z @ square)
    found: Tensor = Z @ T @ Z.mT
    return found


def _orthonormal_rows(W: Tensor) -> Tensor:
    """An orthonormal basis of the row space of (..., k, n), by a Cholesky factor in float64.

    Rows that depend on others up to rounding, and those of a zero matrix, become shorter than one.
    """
    rows = W.double()
    gram = torch.addcmul(_constant("tiny", W.shape[-2], W), rows @ rows.mT, _constant("shift", W.shape[-2], W))
    factor = torch.linalg.cholesky_ex(gram).L
    basis: Tensor = torch.linalg.solve_triangular(factor, rows, upper=False)
    return basis.to(W.dtype)


def gram_of_singular_values(X: Tensor) -> Tensor:
    """XXᵀ in float64 for a wide matrix; its eigenvalues are the squared singular values."""
    exact: Tensor = X.double()
    return exact @ exact.mT


def lanczos_coefficients(stacks: Sequence[Tensor]) -> Tensor:
    """Lanczos iterations of XXᵀ from several orthonormal starts, for the distribution of singular values.

    Args:
        stacks: (Eᵢ, m, nᵢ), m ≤ nᵢ, all in float32 or all in float64; m is at least the number of steps.

    Returns:
        (ΣEᵢ, p, 2, K) in float64: for each start, the diagonal and the off-diagonal of its K x K tridiagonal matrix.
        The last entry of the off-diagonal has no meaning.
    """
    counts, rows = [len(X) for X in stacks], stacks[0].shape[-2]
    # Vectors are rows, so that one product advances all starts.
    v = _orthonormal_start(rows, PROBES, stacks[0]).expand(sum(counts), PROBES, rows)
    before: Tensor | None = None
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    for _ in range(LANCZOS_STEPS):
        # Not reorthogonalised: converged eigenvalues reappear, but share their weight with the copies.
        w = torch.cat([(of_one @ X) @ X.mT for of_one, X in zip(torch.split(v, counts), stacks, strict=True)])
        if before is not None:
            w = torch.addcmul(w, betas[-1], before, value=-1)
        alpha = (v * w).sum(-1, keepdim=True)
        w = torch.addcmul(w, alpha, v, value=-1)
        beta = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
        before, v = v, w / beta.clamp_min(torch.finfo(w.dtype).tiny)
        alphas.append(alpha)
        betas.append(beta)
    return torch.stack([torch.cat(alphas, -1), torch.cat(betas, -1)], -2).double()


# -- Constants, cached by size, dtype and device ------------------------------------------------------------------


def _start(n: int, k: int, X: Tensor) -> Tensor:
    """k fixed starting rows."""
    name = ("start", n, k, X.dtype)
    return cached(name, X, lambda: start_basis(n, k, device=X.device, dtype=X.dtype).mT.contiguous())


def _orthonormal_start(n: int, k: int, X: Tensor) -> Tensor:
    name = ("orthonormal start", n, k, X.dtype)
    return cached(name, X, lambda: _orthonormal_rows(_orthonormal_rows(_start(n, k, X))))


def _constant(name: str, k: int, X: Tensor) -> Tensor:
    """A k x k float64 matrix by its purpose."""

    def make() -> Tensor:
        eye = torch.eye(k, dtype=torch.float64, device=X.device)
        return {"independent": INDEPENDENT * eye, "tiny": 1e-300 * eye, "shift": 1 + SHIFT * eye}[name]

    return cached((name, k), X, make)
