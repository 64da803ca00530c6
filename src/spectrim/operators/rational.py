r"""(I + X Xᵀ/c²)^(-1/2) X by Zolotarev's best rational approximation of the inverse square root: the solver for CPUs.

    λ^(-1/2) ≈ M (1 + Σⱼ aⱼ / (λ + pⱼ))   on [1, κ],   with r poles and a relative error that r and κ determine

Every pole takes the inverse of one positive definite matrix of the small side. For κ up to 3e4, two poles have an error
of a few per cent, and one step of the best odd quintic, of three products, reduces it below 1e-3. The solver reads κ,
so it is for the CPU.

A Gram matrix squares the condition number, so the rounding error of the result is bounded before it is returned. If a
spike makes the bound too large, X is embedded so that the spike's singular directions have rows of their own: the Gram
matrix is then graded, and inverting it keeps small entries accurate. If that is not enough, float64 is used, and at
last the reference. The result is divided by one plus the error bound, so that no singular value exceeds c.
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
SPIKE_RATIO = 4.0  # ‖X‖_F/c above which float32 may lose singular values far below a spike
LARGEST = 1e7  # ‖X‖_F/c above which the reference is used
FIT_SHARE = 0.45  # share of the tolerance for the error of the rational approximation, in either direction
ROUNDING_SHARE = 0.2  # share of the tolerance for rounding errors, in either direction
GRAM_ROUNDING = 0.2  # relative rounding error of the result in eps ‖G‖ ‖(I + G)^(-1)‖; 0.02 to 0.1 was measured
HALVING_ROUNDING = 0.02  # the same for inversion by 2 x 2 blocks, in eps ‖I + G‖²; 0.005 was measured
PRODUCT_ROUNDING = 0.6  # the same for products with a spike, in eps σ₁/c; it rotates the spike but raises no σ
TIGHTEST = 1e-5  # the largest allowed rounding error in float64, for any tolerance
MOST_POLES = 60
QUINTIC_POLES = 1  # poles that take as long as the quintic's three products
LOOSEST_TOL = 0.5  # the largest tolerance that is used
FLOAT32_TOL = 1e-4  # the smallest tolerance for which float32 is tried
POWER_STEPS = 8
POWER_VECTORS = 8
POWER_MARGIN = 1.25  # bound on the largest eigenvalue over the estimate by power steps
SQUARED_RANGE = (1e-140, 1e140)  # of norms whose square neither overflows nor underflows in float64
POLAR_TOL = 1e-5  # relative error of the polar factor
POLAR_KAPPA = 64.0  # the largest condition number of a Gram matrix for which float32 attains POLAR_TOL
POLAR_ROUNDING = 3e-6  # share of POLAR_TOL for rounding errors
UNIT_RANGE = (1e-30, 1e30)  # of float32 thresholds and entries whose products neither overflow nor underflow


class Fit(NamedTuple):
    """The approximation scale + Σⱼ weightⱼ / (λ + shiftⱼ) of (1 + λ)^(-1/2), and a quintic that refines it.

    Without a quintic, the relative error is at most ``error`` in either direction. With a quintic, the sum times
    √(1 + λ) is at most 1, and the quintic maps it into [1 − 2 error, 1].
    """

    scale: float
    weights: tuple[float, ...]
    shifts: tuple[float, ...]
    error: float
    quintic: Quintic | None


def rational(X: Tensor, c: float, tol: float, *, overwrite: bool = False) -> Tensor | None:
    """(I + XXᵀ/c²)^(-1/2) X for one X (m, n), m <= n, on the CPU; None if the caller must use the reference.

    With ``overwrite``, the result may be stored in X's memory.
    """
    size = math.sqrt(energy(X).item())
    if not (0 < c < math.inf and SQUARED_RANGE[0] < size < SQUARED_RANGE[1]):
        return None
    ratio = size / c
    if ratio > LARGEST:
        return None
    tol = min(tol, LOOSEST_TOL)
    if ratio * ratio <= tol:  # the relative change of every singular value is at most tol/2
        return X if overwrite else X.clone()
    out = X if overwrite else torch.empty_like(X)
    float32 = X.dtype == torch.float32 and tol >= FLOAT32_TOL
    float32 = float32 and all(UNIT_RANGE[0] < number < UNIT_RANGE[1] for number in (size, c))
    with true_float32(X.device):
        if float32 and _clip_into(out, X, c, ratio, tol):
            return out
        return out if _clip_into(out, X.double(), c, ratio, tol) else None


def _clip_into(out: Tensor, X: Tensor, c: float, ratio: float, tol: float) -> bool:
    """Store the clipped X in ``out``; False if the rounding of X's dtype exceeds the tolerance."""
    allowed = ROUNDING_SHARE * tol if X.dtype == torch.float32 else min(ROUNDING_SHARE * tol, TIGHTEST)
    # σ₁ is at least ‖X‖_F/√m.
    if not PRODUCT_ROUNDING * torch.finfo(X.dtype).eps * ratio / math.sqrt(len(X)) <= allowed:
        return False
    root = embedding = None
    # With a spike, large matrices are always embedded: inverse_by_halves_ is fast but needs a small tail.
    if ratio <= SPIKE_RATIO or len(X) <= LEAF:
        root = inverse_root(gram_matrix(X, c), tol, allowed)
    if root is None and ratio > SPIKE_RATIO:
        embedding = Embedding(spike_basis(X, c, min(SPIKE_RANK, len(X))))
        root = inverse_root(gram_matrix(X, c, embedding), tol, allowed, embedding.Q.shape[-1])
    if root is None:
        return False
    # The root is applied to the embedded X: the product of a folded root and a spike would cancel.
    blocks = zip(torch.split(X, COLUMN_BLOCK, dim=-1), torch.split(out, COLUMN_BLOCK, dim=-1), strict=True)
    for columns, place in blocks:
        if embedding is None:
            place.copy_(multiply(root, columns))
        else:
            place.copy_(embedding.fold(multiply(root, embedding.apply(columns))))
    return True


def polar_root(gram: Tensor) -> Tensor | None:
    """gram^(-1/2) in float32 for a float64 Gram matrix; None if its condition number is too large."""
    trace = gram.trace().item()
    mean = trace / len(gram)
    # The largest eigenvalue is at least ‖gram‖_F² / trace, and the smallest at most the mean.
    if not torch.linalg.vector_norm(gram).item() ** 2 <= POLAR_KAPPA * mean * trace or trace == 0:
        return None
    scaled = (gram / mean).float()
    with true_float32(gram.device):
        low = 1.001 * eigenvalue_bound(scaled) / POLAR_KAPPA
        unit = math.sqrt(mean * low)
        scaled.div_(low).diagonal().sub_(1)
        if not UNIT_RANGE[0] < unit < UNIT_RANGE[1] or torch.linalg.cholesky_ex(scaled).info.item():
            return None  # the condition number exceeds POLAR_KAPPA
        root = inverse_root(scaled, POLAR_TOL, POLAR_ROUNDING, tail=POLAR_KAPPA - 1)
    return None if root is None else root.div_(unit)


def inverse_root(gram: Tensor, tol: float, allowed: float, spike: int = 0, tail: float | None = None) -> Tensor | None:
    """(I + gram)^(-1/2), divided by one plus its error bound; None if rounding errors may exceed ``allowed``.

    Args:
        gram: (m, m), positive semidefinite. Its first ``spike`` rows and columns may be far larger than the rest:
            in a graded matrix their rounding does not affect the rest.
        tol: relative error of the result.
        allowed: share of it for rounding errors, in either direction.
        tail: a bound on the eigenvalues of the rest, if known.
    """
    eps = torch.finfo(gram.dtype).eps
    rest = gram[spike:, spike:]
    tail = eigenvalue_bound(rest) if tail is None else tail
    by_gram, by_halving = GRAM_ROUNDING * eps * tail, HALVING_ROUNDING * eps * (1 + tail) ** 2
    # The error is by_gram times ‖(I + G)^(-1)‖, which is at least one over the mean eigenvalue.
    if not by_gram / (1 + rest.trace().item() / len(rest)) <= allowed:
        return None
    # The largest eigenvalue is at most the sum of the largest ones of both diagonal blocks.
    top = torch.linalg.eigvalsh(gram[:spike, :spike])[-1].item() if spike else 0.0
    kappa = max(1 + tail + top, 1.01)
    by_product = PRODUCT_ROUNDING * eps * math.sqrt(kappa)
    if not by_product <= allowed:
        return None
    fitted = fit(_rounded_up(kappa), FIT_SHARE * tol, refine=spike == 0)
    if fitted is None:
        return None
    near, error = _near_poles(fitted, tail, FIT_SHARE * tol) if spike else (len(fitted.shifts), fitted.error)
    root = torch.diag_embed(gram.new_full((len(gram),), fitted.scale))
    inverse = None
    if fitted.quintic is not None:  # (I + G) times the root, by the same poles
        inverse = gram * fitted.scale
        inverse.diagonal().add_(fitted.scale + sum(fitted.weights))
    by_halves = by_halving <= (allowed - by_product) / 4
    if by_halves:
        by_gram += by_halving
    for weight, shift in zip(fitted.weights[:near], fitted.shifts[:near], strict=True):
        resolvent = add_resolvent_(root, gram, weight, shift, by_halves=by_halves)
        if resolvent is None:
            return None
        if inverse is not None:
            inverse.add_(resolvent, alpha=-weight * (shift - 1))
        if shift == fitted.shifts[0] and by_gram > (allowed - by_product) / 4:
            by_gram *= min(1.0, shift * eigenvalue_bound(resolvent))  # smaller if no singular value is near c
        del resolvent
        if not by_gram + by_product <= allowed:
            return None
    for weight, shift in zip(fitted.weights[near:], fitted.shifts[near:], strict=True):
        add_far_resolvent_(root, gram, weight, shift, tail, spike)
    if not by_gram + by_product <= allowed:
        return None
    if fitted.quintic is None or inverse is None:
        return root.div_((1 + error) * (1 + by_gram))
    return _refined(root, inverse, fitted.quintic).div_(1 + by_gram)


def _near_poles(fitted: Fit, tail: float, share: float) -> tuple[int, float]:
    """The number of poles that need an inverse, and the error if :func:`add_far_resolvent_` adds the others."""
    near, error = len(fitted.shifts), fitted.error
    while near:
        # From the farthest pole on, a straight line may add half of the remaining share to the error.
        line = fitted.weights[near - 1] * _line_error(fitted.shifts[near - 1], tail) * math.sqrt(1 + tail)
        if line > (share - error) / 2:
            break
        near, error = near - 1, error + line
    return near, error


def _refined(root: Tensor, inverse: Tensor, quintic: Quintic) -> Tensor:
    """The root after a step of the quintic; ``inverse`` is approximately its inverse."""
    square = multiply(root, inverse)
    factor = multiply(square, square).mul_(quintic.c).add_(square, alpha=quintic.b)
    factor.diagonal().add_(quintic.a)
    return multiply(root, factor)


def eigenvalue_bound(A: Tensor) -> float:
    """An upper bound on the largest eigenvalue of a positive semidefinite matrix."""
    if len(A) > LEAF:
        return POWER_MARGIN * largest_eigenvalue(A)
    return float(torch.linalg.vector_norm(multiply(A, A), dtype=torch.float64).sqrt())


def _rounded_up(kappa: float) -> float:
    """The next power of 1.05, so that the cache of fits is often used."""
    return 1.05 ** math.ceil(math.log(kappa, 1.05))


@lru_cache(maxsize=1024)
def fit(kappa: float, error: float, *, refine: bool) -> Fit | None:
    """The cheapest approximation of (1 + λ)^(-1/2) on [0, κ − 1] with this error; None if it takes too many poles.

    With ``refine``, fewer poles and a quintic are an alternative.
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
    """The error of the best linear approximation of 1/(λ + shift) on [0, tail]."""
    return (1 / math.sqrt(shift) - 1 / math.sqrt(shift + tail)) ** 2 / 2


def add_far_resolvent_(out: Tensor, gram: Tensor, weight: float, shift: float, tail: float, spike: int) -> Tensor:
    """Add weight · (G + shift)^(-1) to ``out``, for a shift far above the tail's eigenvalues.

    Only a matrix of the spike's size is inverted. For the tail T, (T + shift)^(-1) is approximated by αI − βT.
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
    """M, the aⱼ, the pⱼ and the relative error of the best M (1 + Σⱼ aⱼ / (λ + pⱼ)) for λ^(-1/2) on [1, κ].

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
    # With λ = κx², the sum is κ^(-1/2) (1 + Σ κaⱼ / (λ + κpⱼ)).
    scale = 2 / (least + most) * low
    error = (most - least) / (most + least)
    return scale, [kappa * a for a in weights], [kappa * pole for pole in p], error


def largest_eigenvalue(A: Tensor, steps: int = POWER_STEPS) -> float:
    """A lower estimate of the largest eigenvalue of a positive semidefinite matrix, by power steps."""
    V = start_basis(len(A), POWER_VECTORS, device=A.device, dtype=A.dtype)
    for _ in range(steps):
        length = torch.linalg.vector_norm(V, dim=-2, keepdim=True)
        V = multiply(A, V / length.clamp_min(torch.finfo(A.dtype).tiny))
    return float(torch.linalg.vector_norm(V, dim=-2).amax())


def spike_basis(X: Tensor, c: float, rank: int) -> Tensor:
    """Left singular vectors Q (m, rank) of X's largest singular values, in descending order, by one subspace step.

    They are rotated within their span to make the rows of QᵀX orthogonal, so that the Gram matrix of these rows keeps
    small ones accurate. They need no further convergence.
    """
    start = start_basis(len(X), rank, device=X.device, dtype=X.dtype)
    # Divided by c, so that the products neither overflow nor underflow in float32.
    Q = torch.linalg.qr(multiply(X, multiply(X.mT, start) / c) / c).Q
    rows = multiply(Q.mT, X).double() / c
    order = torch.linalg.eigh(rows @ rows.mT).eigenvectors.flip(-1)
    basis: Tensor = torch.linalg.qr(Q.double() @ order).Q
    return basis.to(X.dtype)
