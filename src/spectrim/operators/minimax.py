r"""Iterations of best odd quintic polynomials on a known interval: the solver for GPUs.

    X ← X (a I + b XᵀX + c (XᵀX)²),   with the best a, b, c for the interval [l, 1] that contains X's singular values

A step maps [l, 1] to a much narrower [l', 1]; several steps give the polar factor. (I + XXᵀ/c²)^(-1/2) X is a block of
the polar factor of [X/c; I], whose interval is known: [1/√κ, 1] with κ = 1 + σ₁²/c². The iteration has products and
fixed numbers only. It neither reads from the device nor uploads to it, and can be captured in a CUDA graph.
arXiv 2505.16932 (Polar Express) does the same with an estimated interval.

Singular values below the interval do not reach one, and none exceeds one: outside its range, the result is too small
but never too large.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._precision import float32_product, float32_sum

__all__ = ["REACH", "Quintic", "minimax", "minimax_polar", "minimax_quintic", "schedule", "stages"]

REACH = 1e3  # the largest σ₁/c, or σ₁/σ_min, for full accuracy
SIDES = (2**13, 2**25)  # the largest smaller sides m for which schedules allow for the norm's excess of m^(1/8)
FINEST = 5e-4  # the smallest tolerance that float32 attains
GUARD = 1.005  # factor by which an interval's upper end is raised for steep quintics
STEEP = 0.5  # quintics are steep at the upper end of intervals whose lower end is below this
FLAT = 0.98  # from this lower end on, the quintic of l = 1 is as good
LARGEST_STAGE = 3  # steps per Gram matrix; each multiplies the rounding error of small eigenvalues by up to a² = 18
NO_CLIP = 1e8  # c over the largest entry, above which clipping changes nothing


class Quintic(NamedTuple):
    """p(x) = ax + bx³ + cx⁵, which maps [l, 1] into [low, 1] with the largest possible low."""

    a: float
    b: float
    c: float
    low: float


def minimax(X: Tensor, c: Tensor, tol: float) -> Tensor:
    """(I + XXᵀ/c²)^(-1/2) X for X (..., m, n), m <= n, without reading the device.

    A float32 Gram matrix loses singular values far below a spike. It is recomputed every few steps, after which the
    spike is closer to the other singular values.
    """
    Y = X.reshape(-1, *X.shape[-2:])
    c = c.expand(*X.shape[:-2], 1, 1).reshape(-1, 1, 1)
    if tol < FINEST:
        Y, c = Y.double(), c.double()
    largest = _largest(Y)
    c = torch.minimum(c, NO_CLIP * largest)
    # Relative to max(c, largest entry), neither X Xᵀ nor c² overflows.
    unit = torch.maximum(largest, c)
    return (_iterate(Y / unit, stages(X.shape[-2], tol), c / unit) * c).view(X.shape).to(X.dtype)


def minimax_polar(X: Tensor, steps: int | None = None) -> Tensor:
    """The polar factor of X (..., m, n), m <= n, without reading the device; error 1e-3 if σ_min/σ₁ >= 1e-3.

    With ``steps``, the best quintics for so many steps and σ_min/σ₁ >= 1e-2.
    """
    Y = X.reshape(-1, *X.shape[-2:])
    quintics = stages(X.shape[-2], FINEST) if steps is None else _in_stages(ROUGH[:steps])
    return _iterate(Y / _largest(Y), quintics, None).view(X.shape)


def _largest(X: Tensor) -> Tensor:
    """The largest |entry| of every matrix, as (E, 1, 1), and no less than the smallest normal number."""
    largest: Tensor = torch.linalg.vector_norm(X, ord=math.inf, dim=(-2, -1), keepdim=True)
    return largest.clamp_min(torch.finfo(X.dtype).tiny)


def _iterate(Y: Tensor, quintics: list[list[Quintic]], low: Tensor | None) -> Tensor:
    """The first rows of the polar factor of [Y; low I], or the polar factor of Y, for Y with entries up to 1."""
    B = None
    for stage, steps in enumerate(quintics):
        R = float32_product(Y, Y.mT)
        if stage == 0:
            if low is not None:
                R.diagonal(dim1=-2, dim2=-1).add_(low[..., 0].square())
            a, b, c, _ = steps[0]
            square = float32_product(R, R)
            # ‖R²‖_F^¼ is between 1 and m^(1/8) times the largest singular value.
            size = torch.linalg.matrix_norm(square, keepdim=True).sqrt()
            size = size.clamp_min(10 * torch.finfo(R.dtype).tiny ** 0.5)  # its square must not underflow
            R = R / size
            P = b * R + square * (c / size.square())
            P.diagonal(dim1=-2, dim2=-1).add_(a)
            norm = size.sqrt()
            P = _compose(R, steps, P)
            Y = float32_product(P / norm, Y)
            B = None if low is None else P * (low / norm)
        else:
            if B is not None:
                R = float32_sum(R, B, B.mT)
            P = _compose(R, steps, None)
            Y = float32_product(P, Y)
            if B is not None and stage < len(quintics) - 1:
                B = float32_product(P, B)
    return Y


def _compose(R: Tensor, steps: list[Quintic], P: Tensor | None) -> Tensor:
    """The product of the steps' polynomials of R, whose eigenvalues are in [0, 1]; P is the first one, if known.

    It takes 4·steps − 3 products.
    """
    done = None
    for i, (a, b, c, _) in enumerate(steps):
        if i > 0 or P is None:
            P = float32_sum(R, R, R, beta=b, alpha=c)
            P.diagonal(dim1=-2, dim2=-1).add_(a)
        done = P if done is None else float32_product(done, P)
        if i < len(steps) - 1:
            R = float32_product(float32_product(R, P), P)
    assert done is not None
    return done


def stages(m: int, tol: float) -> list[list[Quintic]]:
    """The quintics for matrices of smaller side m, grouped by Gram matrix."""
    side = 0 if m <= SIDES[0] else 1
    return FINE[side] if tol < FINEST else COARSE[side]


def schedule(low: float, tol: float) -> list[Quintic]:
    """Quintics that map [low, 1] to [1 − tol, 1], and [0, 1] into itself."""
    quintics: list[Quintic] = []
    while 1 - low > tol:
        a, b, c, _ = minimax_quintic(low)
        if low < STEEP:  # the slope is 13 at 1: five steps would amplify an excess of 1e-6
            a, b, c = a / GUARD, b / GUARD**3, c / GUARD**5
        low = a * low + b * low**3 + c * low**5
        quintics.append(Quintic(a, b, c, low))
    return quintics


def _in_stages(quintics: list[Quintic]) -> list[list[Quintic]]:
    """Split into the smallest number of groups, with the longer ones first."""
    count = math.ceil(len(quintics) / LARGEST_STAGE)
    groups, start = [], 0
    for i in range(count):
        end = start + math.ceil((len(quintics) - start) / (count - i))
        groups.append(quintics[start:end])
        start = end
    return groups


def minimax_quintic(low: float) -> Quintic:
    """The odd quintic nearest to 1 on [low, 1], by Remez exchange, scaled to a maximum of 1.

    The error 1 − p(x) has its extreme value with alternating sign at four points: low, two inner points, and 1.
    """
    if low >= FLAT:  # the three points merge: (15x − 10x³ + 3x⁵)/8
        a, b, c = 15 / 8, -10 / 8, 3 / 8
        return Quintic(a, b, c, a * low + b * low**3 + c * low**5)
    inner = (low + (1 - low) / 4, low + (1 - low) * 3 / 4)
    error = 0.0
    for _ in range(100):
        points = zip((low, *inner, 1.0), (1, -1, 1, -1), strict=True)
        a, b, c, level = _solve([[x, x**3, x**5, sign, 1.0] for x, sign in points])
        # p' = a + 3bx² + 5cx⁴ vanishes at the new inner points.
        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = (math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c)))
        if abs(level - error) < 1e-15:
            break
        error = level
    top = 1 + error
    return Quintic(a / top, b / top, c / top, (1 - error) / top)


def _solve(rows: list[list[float]]) -> list[float]:
    """Solve a small linear system, with its right side in the last column, by elimination with pivoting.

    In plain Python, so that it works in compiled code and with fake tensors.
    """
    for i in range(len(rows)):
        rows[i:] = sorted(rows[i:], key=lambda row: -abs(row[i]))
        rows[i] = [value / rows[i][i] for value in rows[i]]
        for j in range(len(rows)):
            if j != i:
                rows[j] = [x - rows[j][i] * y for x, y in zip(rows[j], rows[i], strict=True)]
    return [row[-1] for row in rows]


# Computed at import, so that a compiler sees constants.
COARSE = [_in_stages(schedule(1 / (REACH * side**0.125), FINEST)) for side in SIDES]
FINE = [_in_stages(schedule(1 / (REACH * side**0.125), 1e-11)) for side in SIDES]
ROUGH = [*schedule(1e-2, 1e-15), *[minimax_quintic(1.0)] * 20]
