r"""(I + X Xᵀ/c²)^(-1/2) X by Zolotarev's best rational approximation of the inverse square root: the solver for CPUs.

    λ^(-1/2) ≈ M (1 + Σⱼ aⱼ / (λ + pⱼ))   on [1, κ],   with r poles and a relative error that r and κ determine

Every pole costs the inverse of one positive definite matrix of the small side. With κ up to 3e4 two poles leave an
error of a few per cent, which one step of the best odd quintic takes to a tolerance of 1e-3 in three products. κ is
read, so this is for devices where reading is free.

A Gram matrix squares the condition number. Before a result is made, what rounding may have done to it is bounded. If
that is too much because of a spike, X is embedded so that the spike's singular directions have rows of their own: the
Gram matrix is then graded, and inversion of a graded positive definite matrix keeps small entries accurate. If that is
not enough either, all is computed in float64, and at last by the reference. The result is made smaller by as much as
it may have become too large, so that no singular value exceeds c.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ._precision import true_float32
from ._product import multiply
from ._stack import energy
from ._symmetric import COLUMN_BLOCK, LEAF, Embedding, add_resolvent_, gram_matrix
from .minimax import Quintic, minimax_quintic
from .spike import start_basis

__all__ = ["POLAR_TOL", "eigenvalue_bound", "fit", "inverse_root", "polar_root", "rational", "zolotarev"]

SPIKE_RANK = 16  # rows that the embedding adds
SPIKE_RATIO = 4.0  # ‖X‖_F/c above which a spike could drown the rest in float32
LARGEST = 1e7  # ‖X‖_F/c beyond which the reference is left to do its best
FIT_SHARE = 0.45  # of the tolerance, for the error of the rational approximation to either side
ROUNDING_SHARE = 0.2  # of the tolerance, for rounding to either side
GRAM_ROUNDING = 0.2  # relative change of the result, in units of eps ‖G‖ ‖(I + G)^(-1)‖: 0.02 to 0.1 measured
HALVING_ROUNDING = 0.02  # the same by inversion by halves, in units of eps ‖I + G‖²: 0.005 measured
PRODUCT_ROUNDING = 0.6  # of products with a spike, in units of eps σ₁/c; it turns the spike, and makes nothing larger
TIGHTEST = 1e-5  # a bound this tight is promised whatever the tolerance
MOST_POLES = 60
QUINTIC_POLES = 1  # poles that cost as much as the quintic's three products
LOOSEST_TOL = 0.5  # a larger one is taken as this, so that errors stay small against the result
FLOAT32_TOL = 1e-4  # below this tolerance float32 arithmetic is not enough
POWER_STEPS = 8
POWER_VECTORS = 8
POWER_MARGIN = 1.25  # power steps may stop this far below the largest eigenvalue
SQUARED_RANGE = (1e-140, 1e140)  # of norms whose square, in float64, was no rounding
POLAR_TOL = 1e-5  # of the polar factor, which is 1 long in every direction
POLAR_KAPPA = 64.0  # condition number of a Gram matrix up to which float32 leaves that
POLAR_ROUNDING = 3e-6  # what it may take of it
UNIT_RANGE = (1e-30, 1e30)  # of float32 thresholds and entries that neither overflow nor lose digits in a product


class Fit(NamedTuple):
    """scale + Σⱼ weightⱼ / (λ + shiftⱼ) for (1 + λ)^(-1/2), and what is done with it.

    Without a quintic the relative error is ``error`` to either side. With one, times √(1 + λ) it lies in an interval
    with the upper end one, which the quintic takes to [1 − 2 error, 1].
    """

    scale: float
    weights: tuple[float, ...]
    shifts: tuple[float, ...]
    error: float
    quintic: Quintic | None


def rational(X: Tensor, c: float, tol: float, *, overwrite: bool = False) -> Tensor | None:
    """(I + XXᵀ/c²)^(-1/2) X for one finite X (m, n), m <= n, on the CPU; None where the reference has to do it.

    With ``overwrite`` the result may take X's place.
    """
    size = math.sqrt(energy(X).item())
    if not (0 < c < math.inf and SQUARED_RANGE[0] < size < SQUARED_RANGE[1]):
        return None  # zero among them
    ratio = size / c
    if ratio > LARGEST:
        return None
    tol = min(tol, LOOSEST_TOL)
    if ratio * ratio <= tol:  # then no singular value changes by more than tol/2 of itself
        return X if overwrite else X.clone()
    out = X if overwrite else torch.empty_like(X)
    float32 = X.dtype == torch.float32 and tol >= FLOAT32_TOL
    float32 = float32 and all(UNIT_RANGE[0] < number < UNIT_RANGE[1] for number in (size, c))
    with true_float32(X.device):
        if float32 and _clip_into(out, X, c, ratio, tol):
            return out
        return out if _clip_into(out, X.double(), c, ratio, tol) else None


def _clip_into(out: Tensor, X: Tensor, c: float, ratio: float, tol: float) -> bool:
    """Clip X in its arithmetic into ``out``, or tell that its rounding would not leave the tolerance."""
    allowed = ROUNDING_SHARE * tol if X.dtype == torch.float32 else min(ROUNDING_SHARE * tol, TIGHTEST)
    # σ₁ is no less than ‖X‖_F/√m.
    if not PRODUCT_ROUNDING * torch.finfo(X.dtype).eps * ratio / math.sqrt(len(X)) <= allowed:
        return False
    root = embedding = None
    # A large matrix is embedded at once: inversion by halves, which it gains from, needs a small tail.
    if ratio <= SPIKE_RATIO or len(X) <= LEAF:
        root = inverse_root(gram_matrix(X, c), tol, allowed)
    if root is None and ratio > SPIKE_RATIO:
        embedding = Embedding(spike_basis(X, c, min(SPIKE_RANK, len(X))))
        root = inverse_root(gram_matrix(X, c, embedding), tol, allowed, embedding.Q.shape[-1])
    if root is None:
        return False
    # The root is not folded back into a matrix of X's side, whose product with a spike would cancel.
    blocks = zip(torch.split(X, COLUMN_BLOCK, dim=-1), torch.split(out, COLUMN_BLOCK, dim=-1), strict=True)
    for columns, place in blocks:
        if embedding is None:
            place.copy_(multiply(root, columns))
        else:
            place.copy_(embedding.fold(multiply(root, embedding.apply(columns))))
    return True


def polar_root(gram: Tensor) -> Tensor | None:
    """gram^(-1/2) in float32 for a float64 Gram matrix of a small condition number; None for any other."""
    trace = gram.trace().item()
    mean = trace / len(gram)
    # The largest eigenvalue is no less than the mean of all, weighted by themselves; the least no more than the mean.
    if not torch.linalg.vector_norm(gram).item() ** 2 <= POLAR_KAPPA * mean * trace or trace == 0:
        return None
    scaled = (gram / mean).float()
    with true_float32(gram.device):
        low = 1.001 * eigenvalue_bound(scaled) / POLAR_KAPPA
        unit = math.sqrt(mean * low)
        scaled.div_(low).diagonal().sub_(1)
        if not UNIT_RANGE[0] < unit < UNIT_RANGE[1] or torch.linalg.cholesky_ex(scaled).info.item():
            return None  # some eigenvalue is less than κ allows
        root = inverse_root(scaled, POLAR_TOL, POLAR_ROUNDING, tail=POLAR_KAPPA - 1)
    return None if root is None else root.div_(unit)


def inverse_root(gram: Tensor, tol: float, allowed: float, spike: int = 0, tail: float | None = None) -> Tensor | None:
    """(I + gram)^(-1/2), made so much smaller that it is nowhere too large; None where rounding would not allow it.

    Args:
        gram: (m, m), positive semidefinite. Its first ``spike`` rows and columns may be far larger than the rest:
            gradedness protects the rest from their rounding.
        tol: relative error of the result.
        allowed: the part of it that rounding may take, to either side.
        tail: a bound on the eigenvalues behind the spike, where one is known.
    """
    eps = torch.finfo(gram.dtype).eps
    rest = gram[spike:, spike:]
    tail = eigenvalue_bound(rest) if tail is None else tail
    by_gram, by_halving = GRAM_ROUNDING * eps * tail, HALVING_ROUNDING * eps * (1 + tail) ** 2
    # What rounding does is less by ‖(I + G)^(-1)‖, which is no less than one over the mean eigenvalue.
    if not by_gram / (1 + rest.trace().item() / len(rest)) <= allowed:
        return None
    # No eigenvalue of a positive semidefinite matrix exceeds the sum of those of its diagonal blocks.
    top = torch.linalg.eigvalsh(gram[:spike, :spike])[-1].item() if spike else 0.0
    kappa = max(1 + tail + top, 1.01)
    by_product = PRODUCT_ROUNDING * eps * math.sqrt(kappa)
    if not by_product <= allowed:
        return None
    found = fit(_rounded_up(kappa), FIT_SHARE * tol, refine=spike == 0)
    if found is None:
        return None
    scale, weights, shifts, error, quintic = found
    near = len(shifts)
    while spike and near:
        # What the fit leaves of its share goes to far poles by halves, from the farthest on.
        line = weights[near - 1] * _line_error(shifts[near - 1], tail) * math.sqrt(1 + tail)
        if line > (FIT_SHARE * tol - error) / 2:
            break
        near, error = near - 1, error + line
    root = torch.diag_embed(gram.new_full((len(gram),), scale))
    inverse = None
    if quintic is not None:  # (I + G) times the root, by the same poles
        inverse = gram * scale
        inverse.diagonal().add_(scale + sum(weights))
    by_halves = by_halving <= (allowed - by_product) / 4
    if by_halves:
        by_gram += by_halving
    for weight, shift in zip(weights[:near], shifts[:near], strict=True):
        resolvent = add_resolvent_(root, gram, weight, shift, by_halves=by_halves)
        if resolvent is None:
            return None
        if inverse is not None:
            inverse.add_(resolvent, alpha=-weight * (shift - 1))
        if shift == shifts[0] and by_gram > (allowed - by_product) / 4:
            by_gram *= min(1.0, shift * eigenvalue_bound(resolvent))  # nothing may lie near c
        del resolvent
        if not by_gram + by_product <= allowed:
            return None
    for weight, shift in zip(weights[near:], shifts[near:], strict=True):
        add_far_resolvent_(root, gram, weight, shift, tail, spike)
    if not by_gram + by_product <= allowed:
        return None
    if quintic is None or inverse is None:
        return root.div_((1 + error) * (1 + by_gram))
    square = multiply(root, inverse)
    factor = multiply(square, square).mul_(quintic.c).add_(square, alpha=quintic.b)
    factor.diagonal().add_(quintic.a)
    return multiply(root, factor).div_(1 + by_gram)


def eigenvalue_bound(A: Tensor) -> float:
    """An upper bound on the largest eigenvalue of a positive semidefinite matrix."""
    if len(A) > LEAF:
        return POWER_MARGIN * largest_eigenvalue(A)
    return float(torch.linalg.vector_norm(multiply(A, A), dtype=torch.float64).sqrt())


def _rounded_up(kappa: float) -> float:
    """The next power of 1.05, so that few fits are made."""
    return 1.05 ** math.ceil(math.log(kappa, 1.05))


@lru_cache(maxsize=1024)
def fit(kappa: float, error: float, *, refine: bool) -> Fit | None:
    """The cheapest approximation of (1 + λ)^(-1/2) on [0, κ − 1] with at most that error; None where many poles fail.

    With ``refine`` a quintic may take fewer poles the rest of the way.
    """
    refined: Fit | None = None
    for poles in range(1, MOST_POLES):
        scale, factors, places, rough = zolotarev(kappa, poles)
        shifts = tuple(1 + place for place in places)
        if refined is not None and poles > len(refined.shifts) + QUINTIC_POLES:
            return refined
        if rough <= error:
            return Fit(scale, tuple(scale * factor for factor in factors), shifts, rough, None)
        if refine and refined is None:
            quintic = minimax_quintic((1 - rough) / (1 + rough))
            if (1 - quintic.low) / 2 <= error:
                scale /= 1 + rough
                weights = tuple(scale * factor for factor in factors)
                refined = Fit(scale, weights, shifts, (1 - quintic.low) / 2, quintic)
    return refined


def _line_error(shift: float, tail: float) -> float:
    """The least error of a straight line for 1/(λ + shift) on [0, tail]."""
    return (1 / math.sqrt(shift) - 1 / math.sqrt(shift + tail)) ** 2 / 2


def add_far_resolvent_(out: Tensor, gram: Tensor, weight: float, shift: float, tail: float, spike: int) -> Tensor:
    """Add weight · (G + shift)^(-1), where shift is far above the tail's eigenvalues, with no inverse but the spike's.

    For the tail T the best straight line stands in, (T + shift)^(-1) = αI − βT; the spike is eliminated exactly.
    """
    top, side, rest = gram[:spike, :spike], gram[spike:, :spike], gram[spike:, spike:]
    slope = 1 / (shift * (shift + tail))
    level = 1 / shift - _line_error(shift, tail)
    eliminated = level * side - slope * multiply(rest, side)
    core = top - multiply(side.mT, eliminated)
    core.diagonal().add_(shift)
    core = weight * torch.linalg.inv_ex(core).inverse
    corner = multiply(eliminated, core)
    out[:spike, :spike] += core
    out[spike:, :spike] -= corner
    out[:spike, spike:] -= corner.mT
    tails = out[spike:, spike:]
    tails.add_(multiply(corner, eliminated.mT)).add_(rest, alpha=-slope * weight)
    tails.diagonal().add_(level * weight)
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


def largest_eigenvalue(A: Tensor, steps: int = POWER_STEPS) -> float:
    """The largest eigenvalue of a positive semidefinite matrix, from below, by power steps."""
    V = start_basis(len(A), POWER_VECTORS, device=A.device, dtype=A.dtype)
    for _ in range(steps):
        length = torch.linalg.vector_norm(V, dim=-2, keepdim=True)
        V = multiply(A, V / length.clamp_min(torch.finfo(A.dtype).tiny))
    return float(torch.linalg.vector_norm(V, dim=-2).amax())


def spike_basis(X: Tensor, c: float, rank: int) -> Tensor:
    """Left singular vectors Q (m, rank) of X's largest singular values, in descending order, by one subspace step.

    They are turned within their span until the rows of QᵀX are orthogonal: else the largest would drown the others in
    the rounding of a Gram matrix. Further than that they need not have converged.
    """
    start = start_basis(len(X), rank, device=X.device, dtype=X.dtype)
    # Over c, so that two products of very large or small numbers stay within float32.
    Q = torch.linalg.qr(multiply(X, multiply(X.mT, start) / c) / c).Q
    rows = multiply(Q.mT, X).double() / c
    order = torch.linalg.eigh(rows @ rows.mT).eigenvectors.flip(-1)
    basis: Tensor = torch.linalg.qr(Q.double() @ order).Q
    return basis.to(X.dtype)
