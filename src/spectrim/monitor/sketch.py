"""What a device works out about a matrix without waiting for the host: a few numbers from which the host reads metrics.

Everything here is products, small Cholesky factors and reductions, which a device can queue without the host waiting;
eigenvalues of the small matrices that they leave are the host's work (:mod:`metrics`). Starts are fixed numbers, a
function of the shape, so no random state is touched and a run that resumes measures the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.operators._stack import energy
from spectrim.operators.spike import start_basis

__all__ = [
    "Entries",
    "entry_statistics",
    "gram_of_singular_values",
    "krylov_columns",
    "krylov_gram",
    "krylov_grams",
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
#: Columns of a Krylov space that is left to the host as it is. Of a larger one it gets the part with the leading
#: eigenvalues: those of 72 columns would take it ten times longer than those of 32.
SMALL = 32
#: Subspace iterations, of two products each, that find that part.
SHRINKING = 4
#: Starts and steps of the Lanczos iterations from which a share of singular values is estimated; of more steps the
#: share gains little, for what is left is the spread of the starts.
PROBES, LANCZOS_STEPS = 8, 14
#: Added to the unit diagonal of the Gram matrix of a Krylov basis, in float64: directions that float32 does not tell
#: apart count for nothing, so that an estimate never exceeds its singular value by more than rounding.
INDEPENDENT = 1e-7
#: Relative shift of a block's Gram matrix, in float64, at which its Cholesky factor exists.
SHIFT = 1e-14
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
    # Not aminmax, which is ten times slower on the host.
    low, high = flat.amin(-1), flat.amax(-1)
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
        (..., s, s), s as :func:`krylov_columns` says, in float64.
    """
    stack = X.reshape(-1, *X.shape[-2:])
    found = krylov_grams([stack], rank, energy(stack))
    return found.view(*X.shape[:-2], *found.shape[-2:])


def krylov_grams(stacks: Sequence[Tensor], rank: int, energies: Tensor) -> Tensor:
    """:func:`krylov_gram` of stacks (Eᵢ, m, nᵢ) that differ in nᵢ: products with them apart, all else in one batch.

    Args:
        stacks: of one dtype.
        rank: how many directions matter.
        energies: ‖X‖_F² of every matrix, (ΣEᵢ), in float64.

    Returns:
        (ΣEᵢ, s, s), in float64.
    """
    rows = stacks[0].shape[-2]
    block, depth = krylov_size(rows, rank)
    if block == rows:
        return torch.cat([gram_of_singular_values(X) for X in stacks])
    counts = [len(X) for X in stacks]
    # Vectors are rows, which a thin product reads far faster than columns.
    starts = [_start(X.shape[-1], block, X).expand(len(X), block, X.shape[-1]) for X in stacks]
    # Of XXᵀ minus its mean eigenvalue the Krylov space is the same, but the blocks of noise differ far more.
    mean = (energies / rows).to(stacks[0].dtype)[..., None, None]
    basis: list[Tensor] = []
    images = [starts]
    for _ in range(depth):
        W = torch.cat([V @ X.mT for V, X in zip(images[-1], stacks, strict=True)])
        basis.append(_orthonormal_rows(torch.addcmul(W, mean, basis[-1], value=-1) if basis else W))
        images.append([Q @ X for Q, X in zip(torch.split(basis[-1], counts), stacks, strict=True)])
    wholes = [torch.cat(of_one, -2).double() for of_one in zip(*images[1:], strict=True)]
    B, gram = torch.cat(basis, -2).double(), torch.cat([Y @ Y.mT for Y in wholes])
    # With L Lᵀ = B Bᵀ the rows of L⁻¹B are orthonormal, and L⁻¹Y is X's part in their space.
    L = torch.linalg.cholesky_ex(B @ B.mT + _constant("independent", B.shape[-2], B)).L
    half = torch.linalg.solve_triangular(L, gram, upper=False)
    found: Tensor = torch.linalg.solve_triangular(L, half.mT, upper=False)
    size = krylov_columns(rows, rank)
    return found if size == found.shape[-1] else _leading_part(found, size)


def krylov_columns(rows: int, rank: int) -> int:
    """The size of what :func:`krylov_gram` gives for a wide matrix."""
    block, depth = krylov_size(rows, rank)
    return min(block * depth, max(SMALL, 2 * block))


def _leading_part(T: Tensor, size: int) -> Tensor:
    """A matrix of this size whose leading eigenvalues are those of T, (..., s, s) in float64, by subspace iterations.

    Twice the columns of a block leave a gap below the eigenvalues that matter, so that few iterations do. The last
    columns of T belong to the last blocks, which are nearest to the leading directions.
    """
    # Of small gradients the fourth power would underflow.
    unit = T / T.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(1e-300)[..., None, None]
    # Rows, of a symmetric matrix.
    Z = unit[..., -size:, :]
    for _ in range(SHRINKING):
        Z = _orthonormal_rows(Z @ unit @ unit)
    found: Tensor = Z @ T @ Z.mT
    return found


def _orthonormal_rows(W: Tensor) -> Tensor:
    """An orthonormal basis of the space of the rows of (..., k, n), by a Cholesky factor in float64.

    Rows that depend on others to rounding, and those of a zero matrix, come out shorter than one, never longer.
    """
    rows = W.double()
    gram = torch.addcmul(_constant("tiny", W.shape[-2], W), rows @ rows.mT, _constant("shift", W.shape[-2], W))
    factor = torch.linalg.cholesky_ex(gram).L
    basis: Tensor = torch.linalg.solve_triangular(factor, rows, upper=False)
    return basis.to(W.dtype)


def gram_of_singular_values(X: Tensor) -> Tensor:
    """XXᵀ of a wide matrix in float64: its eigenvalues are the squared singular values."""
    exact: Tensor = X.double()
    return exact @ exact.mT


def lanczos_shape(rows: int) -> tuple[int, int]:
    """Probes and steps of :func:`lanczos_coefficients` for a wide matrix."""
    return min(PROBES, rows), min(LANCZOS_STEPS, rows)


def lanczos_coefficients(*stacks: Tensor) -> Tensor:
    """Lanczos iterations of XXᵀ from several orthonormal starts, for the density of singular values.

    Args:
        stacks: one (..., m, n), m ≤ n, in float32 or float64; or several (Eᵢ, m, nᵢ) of one dtype.

    Returns:
        (..., p, 2, K) or (ΣEᵢ, p, 2, K) in float64: for each start the diagonal of its K x K tridiagonal matrix, and
        its off-diagonal, of which the last entry means nothing.
    """
    leading, rows = stacks[0].shape[:-2], stacks[0].shape[-2]
    if len(stacks) > 1:
        leading = torch.Size([sum(map(len, stacks))])
    probes, steps = lanczos_shape(rows)
    # Vectors as rows, so that every start's iteration is a row of one product.
    v = _orthonormal_start(rows, probes, stacks[0]).expand(*leading, probes, rows)
    before: Tensor | None = None
    beta: Tensor | None = None
    alphas, betas = [], []
    for _ in range(steps):
        each = list(torch.split(v, [len(X) for X in stacks])) if len(stacks) > 1 else [v]
        # Not orthogonalised against all vectors so far: converged values come back as ghosts, but share their weight.
        products = [(of_one @ X) @ X.mT for of_one, X in zip(each, stacks, strict=True)]
        w = torch.cat(products) if len(products) > 1 else products[0]
        if before is not None and beta is not None:
            w = torch.addcmul(w, beta, before, value=-1)
        alpha = (v * w).sum(-1, keepdim=True)
        w = torch.addcmul(w, alpha, v, value=-1)
        beta = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
        before, v = v, w / beta.clamp_min(torch.finfo(w.dtype).tiny)
        alphas.append(alpha)
        betas.append(beta)
    return torch.stack([torch.cat(alphas, -1), torch.cat(betas, -1)], -2).double()


# -- Constants, made once for every size, dtype and device ------------------------------------------------------------

_CONSTANTS: dict[tuple[object, ...], Tensor] = {}


def _once(make: Callable[[], Tensor], X: Tensor, *key: object) -> Tensor:
    key = (*key, X.dtype, X.device)
    if key not in _CONSTANTS:
        made = make()
        if type(made) is not Tensor:
            return made  # fake, of a step that is only traced or counted
        _CONSTANTS[key] = made
    return _CONSTANTS[key]


def _start(n: int, k: int, X: Tensor) -> Tensor:
    """k rows of fixed numbers."""
    return _once(lambda: start_basis(n, k, device=X.device, dtype=X.dtype).mT.contiguous(), X, "start", n, k)


def _orthonormal_start(n: int, k: int, X: Tensor) -> Tensor:
    return _once(lambda: _orthonormal_rows(_orthonormal_rows(_start(n, k, X))), X, "orthonormal start", n, k)


def _constant(name: str, k: int, X: Tensor) -> Tensor:
    """Small k x k matrices in float64, by what they are for."""

    def make() -> Tensor:
        eye = torch.eye(k, dtype=torch.float64, device=X.device)
        return {"independent": INDEPENDENT * eye, "tiny": 1e-300 * eye, "shift": 1 + SHIFT * eye}[name]

    return _once(make, X, name, k)
