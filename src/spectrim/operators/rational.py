r"""(I + X Xᵀ/c²)^(-1/2) X by Zolotarev's best rational approximation of the inverse square root: the solver for CPUs.

    λ^(-1/2) ≈ M (1 + Σⱼ aⱼ / (λ + pⱼ))   on [1, κ],   with r poles and a relative error that r and κ determine

Every pole costs the inverse of one positive definite matrix of the small side, no more than one product of it, and next
to nothing where it lies far beyond all but a spike. Four to seven poles do where a polynomial iteration takes fifteen
products. Reads κ, so it is for devices where that is free.

A Gram matrix squares the condition number. Where a spike would drown the rest in rounding, X is first turned so that
the spike lies in its first rows: the Gram matrix is then graded, and inversion of a graded positive definite matrix
keeps small entries accurate. What even that cannot serve is computed in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._product import product
from ._stack import energy
from ._symmetric import COLUMN_BLOCK, Reflector, add_resolvents_, gram_matrix, mirror_, reflect
from .spike import start_basis

__all__ = ["largest_eigenvalue", "rational", "zolotarev"]

SPIKE_RANK = 16  # rows that the rotation sets apart
SPIKE_RATIO = 10.0  # ‖X‖_F/c above which a spike could drown the rest in float32
FIT_SHARE = 0.95  # of the tolerance, for the rational approximation, whose error is that large at its extremes only
ROUNDING_SHARE = 0.15  # of the tolerance, for rounding, which adds to it like noise
ROUNDING = 1.5  # the error of an inverse, in units of eps times the bound on ‖G‖: measured, see _accurate
LARGEST = 1e6  # ‖X‖_F/c beyond which the reference is left to do its best
MOST_POLES = 40
AT_FIRST = 2  # poles after which it is asked whether rounding allows to go on
FLOAT32_TOL = 1e-4  # below this tolerance float32 arithmetic is not enough
POWER_STEPS = 8
POWER_VECTORS = 8
POWER_MARGIN = 1.25  # power steps may stop this far below the largest eigenvalue


def rational(X: Tensor, c: Tensor, tol: float, *, overwrite: bool = False) -> Tensor | None:
    """(I + XXᵀ/c²)^(-1/2) X for X (..., m, n), m <= n, on the CPU; None where σ₁/c is beyond even float64.

    With ``overwrite`` the result may take X's place.
    """
    if X.dtype == torch.float64 or tol < FLOAT32_TOL:
        root = _root_in_precision(X, c, tol, torch.float64)
    else:
        root = _root_in_precision(X, c, tol, torch.float32)
        if root is None:
            root = _root_in_precision(X, c, tol, torch.float64)
    if root is None:
        return None
    if isinstance(root, Unchanged):
        return X if overwrite else X.clone()
    if root.dtype != X.dtype:
        return product(root, X.to(root.dtype)).to(X.dtype)
    if not overwrite:
        return product(root, X)
    for columns in torch.split(X, COLUMN_BLOCK, dim=-1):
        columns.copy_(product(root, columns))
    return X


class Unchanged:
    """Stands for a root so near the identity that X is its own result."""


def _root_in_precision(X: Tensor, c: Tensor, tol: float, dtype: torch.dtype) -> Tensor | Unchanged | None:
    """(I + XXᵀ/c²)^(-1/2) in the given arithmetic, or None where its rounding would not leave the tolerance."""
    Y, c = X.to(dtype), c.to(dtype)
    largest = (energy(Y).sqrt() / c[..., 0, 0]).amax().item()
    if not largest < LARGEST:
        return None
    if largest * largest <= tol:  # then no singular value changes by more than tol/2 of itself
        return Unchanged()
    if largest <= SPIKE_RATIO or dtype == torch.float64 or X.shape[-2] <= 4 * SPIKE_RANK:
        return inverse_root(gram_matrix(Y, c), tol)
    reflector = spike_reflector(Y, c, SPIKE_RANK)
    root = inverse_root(gram_matrix(Y, c, reflector), tol, SPIKE_RANK)
    # H S H is small; turning the product with X back would touch all of it once more.
    return None if root is None else reflect(reflect(root, reflector).mT, reflector)


def inverse_root(gram: Tensor, tol: float, spike: int = 0) -> Tensor | None:
    """(I + gram)^(-1/2) of a stack to a relative error of tol, or None where rounding would not allow it.

    The first spike rows and columns may be far larger than the rest: gradedness protects the rest from their rounding.
    """
    tail = POWER_MARGIN * largest_eigenvalue(gram[..., spike:, spike:])
    # No eigenvalue of a positive semidefinite matrix exceeds the sum of those of its diagonal blocks.
    kappa = 1 + tail + (torch.linalg.eigvalsh(gram[..., :spike, :spike])[..., -1] if spike else 0)
    limits = [max(value, 1.01) for value in kappa.reshape(-1).tolist()]
    poles = next(r for r in range(1, MOST_POLES) if zolotarev(max(limits), r)[3] <= FIT_SHARE * tol)
    fits = [zolotarev(limit, poles) for limit in limits]
    bounds = tail.reshape(-1).tolist()
    stack = (*kappa.shape, 1, 1)
    root = torch.diag_embed(
        gram.new_tensor([fit[0] for fit in fits]).reshape(kappa.shape)[..., None].expand(gram.shape[:-1])
    )
    near = [j for j in range(poles) if not (spike and _far(fits, j, bounds, tol))]
    for some in (near[:AT_FIRST], near[AT_FIRST:]):
        if some:
            weights = [[scale * factors[j] for j in some] for scale, factors, _, _ in fits]
            sizes = add_resolvents_(root, gram, weights, [[1 + places[j] for j in some] for _, _, places, _ in fits])
            if some[0] == 0 and not _accurate(*sizes, tail, torch.finfo(gram.dtype).eps, tol):
                return None
    mirror_(root)
    for j in sorted(set(range(poles)) - set(near)):
        weight = gram.new_tensor([fit[0] * fit[1][j] for fit in fits]).reshape(stack)
        shift = gram.new_tensor([1 + fit[2][j] for fit in fits]).reshape(stack)
        add_far_resolvent_(root, gram, weight, shift, tail[..., None, None], spike)
    return root


def _accurate(norm: Tensor, inner: Tensor, tail: Tensor, eps: float, tol: float) -> bool:
    """Whether rounding leaves (I + G)^(-1/2) X within tol, seen from ‖R‖ and tr G R for R = (G + shift)^(-1).

    An error E in the Gram matrix changes the result by about E/2 times (I + G)^(-1), for which the first resolvent R
    stands in, and the result's squared size is tr G (I + G)^(-1). So a tail far above the threshold, where the map is
    flat, allows far larger singular values than a tail near it.
    """
    return bool((ROUNDING * eps * tail / 2 * norm <= ROUNDING_SHARE * tol * inner.clamp_min(0).sqrt()).all())


def _far(fits: list[tuple[float, list[float], list[float], float]], j: int, tails: list[float], tol: float) -> bool:
    """Whether every matrix's pole j is so far from its tail that a straight line may stand in for the resolvent there.

    What the fit leaves of its tolerance is shared out by halves, from the farthest pole on.
    """
    return all(
        scale * weights[j] * _line_error(1 + poles[j], tail) * math.sqrt(1 + tail)
        <= (FIT_SHARE * tol - error) / 2 ** (len(poles) - j)
        for (scale, weights, poles, error), tail in zip(fits, tails, strict=True)
    )


def _line_error(shift: float, tail: float) -> float:
    """The least error of a straight line for 1/(λ + shift) on [0, tail]."""
    return (1 / math.sqrt(shift) - 1 / math.sqrt(shift + tail)) ** 2 / 2


def add_far_resolvent_(out: Tensor, gram: Tensor, weight: Tensor, shift: Tensor, tail: Tensor, spike: int) -> Tensor:
    """Add weight · (G + shift)^(-1), where shift is far above the tail's eigenvalues, with no inverse but the spike's.

    For the tail T the best straight line stands in, (T + shift)^(-1) = αI − βT; the spike is eliminated exactly.
    """
    top, side, rest = gram[..., :spike, :spike], gram[..., spike:, :spike], gram[..., spike:, spike:]
    slope = 1 / (shift * (shift + tail))
    level = 1 / shift - (shift.rsqrt() - (shift + tail).rsqrt()).square() / 2
    eliminated = level * side - slope * product(rest, side)
    core = top - product(side.mT, eliminated)
    core.diagonal(dim1=-2, dim2=-1).add_(shift[..., 0])
    core = weight * torch.linalg.inv_ex(core).inverse
    corner = product(eliminated, core)
    out[..., :spike, :spike] += core
    out[..., spike:, :spike] -= corner
    out[..., :spike, spike:] -= corner.mT
    tails = out[..., spike:, spike:]
    tails.add_(product(corner, eliminated.mT)).addcmul_(rest, slope * weight, value=-1)
    tails.diagonal(dim1=-2, dim2=-1).add_((level * weight)[..., 0])
    return out


def zolotarev(kappa: float, poles: int) -> tuple[float, list[float], list[float], float]:
    """The best M (1 + Σⱼ aⱼ / (λ + pⱼ)) for λ^(-1/2) on [1, κ]: M, the aⱼ, the pⱼ and the relative error.

    x (1 + Σⱼ aⱼ / (x² + pⱼ)) is Zolotarev's approximation of sign(x) of type (2r+1, 2r) on [1/√κ, 1]; its zeros and
    poles are Jacobi's sn/cn at equally spaced points, computed by the arithmetic-geometric mean.
    """
    low = 1 / math.sqrt(kappa)
    means, excess = [1.0], [math.sqrt(1 - low * low)]
    b = low
    while excess[-1] > 1e-16:
        a = means[-1]
        means.append((a + b) / 2)
        excess.append((a - b) / 2)
        b = math.sqrt(a * b)
    squares = []
    for i in range(1, 2 * poles + 1):
        phi = 2 ** (len(means) - 1) * math.pi / 2 * i / (2 * poles + 1)
        for a, e in zip(means[:0:-1], excess[:0:-1], strict=True):
            phi = (phi + math.asin(e / a * math.sin(phi))) / 2
        squares.append((low * math.tan(phi)) ** 2)
    p, q = squares[0::2], squares[1::2]
    weights = [
        -math.prod(p[j] - zero for zero in q) / math.prod(p[j] - p[i] for i in range(poles) if i != j)
        for j in range(poles)
    ]

    def value(x: float) -> float:
        return x * (1 + sum(a / (x * x + pole) for a, pole in zip(weights, p, strict=True)))

    least, most = value(low), value(1.0)
    # In λ = κx² the sum reads κ^(-1/2) (1 + Σ κaⱼ / (λ + κpⱼ)).
    scale = 2 / (least + most) * low
    error = (most - least) / (most + least)
    return scale, [kappa * a for a in weights], [kappa * pole for pole in p], error


def largest_eigenvalue(A: Tensor, steps: int = POWER_STEPS) -> Tensor:
    """The largest eigenvalue of positive semidefinite matrices (..., n, n), from below, by power steps."""
    V = start_basis(A.shape[-1], POWER_VECTORS, device=A.device, dtype=A.dtype).expand(*A.shape[:-1], POWER_VECTORS)
    for _ in range(steps):
        length = torch.linalg.vector_norm(V, dim=-2, keepdim=True)
        V = product(A, V / length.clamp_min(torch.finfo(A.dtype).tiny))
    norms: Tensor = torch.linalg.vector_norm(V, dim=-2)
    return norms.amax(-1)


def spike_reflector(X: Tensor, c: Tensor, rank: int) -> Reflector:
    """V and T of a reflection H = I − V T Vᵀ that moves X's dominant left directions into the first rows of HX.

    H is orthogonal whatever the directions are, so how well they have converged matters for grading only. With Q their
    basis and Q₁ = P S the polar form of its first rows, V = Q + [P; 0] and T = (I + S)^(-1).
    """
    start = start_basis(X.shape[-2], rank, device=X.device, dtype=X.dtype).expand(*X.shape[:-1], rank)
    # Over c, so that two products of very large or small numbers stay within float32.
    Q = torch.linalg.qr(product(X, product(X.mT, start) / c) / c).Q
    left, sigma, right = torch.linalg.svd(Q[..., :rank, :])
    V = Q.clone()
    V[..., :rank, :] += left @ right
    T = (right.mT / (1 + sigma[..., None, :])) @ right
    return V, T
