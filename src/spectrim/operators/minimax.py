r"""Odd quintic polynomials that are best on a known interval, and the iterations made of them: the solver for GPUs.

    X ← X (a I + b XᵀX + c (XᵀX)²),   with a, b, c best for the interval [l, 1] that holds X's singular values

A step sends [l, 1] to a much narrower [l', 1]; composing steps gives the polar factor. (I + XXᵀ/c²)^(-1/2) X is a
block of the polar factor of [X/c; I], whose interval is known: [1/√κ, 1] with κ = 1 + σ₁²/c². Nothing but products, and
no reading of the device: the number of steps follows from a bound on κ that the shape gives, and each matrix's own
coefficients are looked up on its device. The same idea, with the interval guessed, is arXiv 2505.16932 (Polar Express).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._product import product
from ._stack import entry_maximum

__all__ = ["Quintic", "minimax", "minimax_polar", "minimax_quintic", "steps_to_reach"]

LEAST_LOW = 1e-5  # intervals that reach further down are treated like this one
GRID = 100  # intervals tabulated, equally spaced in log l
LIMIT_LOW = 0.85  # from here on the quintic of l = 1 is as good, and needs no guard: it is flat at one
STEPS_PER_GRAM = 3  # a step multiplies the rounding of a small eigenvalue of the Gram matrix by up to a² = 18
GUARD = 1.01  # every interval is taken this much longer at its upper end
NEARLY = 0.97  # one more step takes an interval that begins here to within 1e-4 of one
REACH = 1e3  # σ₁/c served at full accuracy whatever the shape


class Quintic(NamedTuple):
    """p(x) = ax + bx³ + cx⁵, which maps [l, 1] into [low, 1] with the largest low that any such p attains."""

    a: float
    b: float
    c: float
    low: float


def minimax(X: Tensor, c: Tensor, steps: int | None = None) -> Tensor:
    """(I + XXᵀ/c²)^(-1/2) X for X (..., m, n), m <= n, without reading the device.

    The Gram matrix of a float32 X loses what lies far below a spike, so it is taken anew every few steps, from a result
    in which the spike has shrunk towards the others' size.
    """
    m, n = X.shape[-2:]
    if steps is None:
        # The norm below is at most m^¼ times σ₁; entries of one size c or less have σ₁ <= √(mn) c.
        steps = steps_to_reach(1 / (m**0.25 * max(REACH, math.sqrt(m * n))))
    # In units of max(c, largest entry) neither X Xᵀ nor c² overflows.
    unit = torch.maximum(entry_maximum(X), c)
    Y, low = X / unit, c / unit
    B = low * torch.eye(m, dtype=X.dtype, device=X.device)
    norm = _root_norm(product(Y, Y.mT) + product(B, B.mT))
    Y, B, low = Y / norm, B / norm, low / norm
    for done in range(0, steps, STEPS_PER_GRAM):
        P, low = _compose(product(Y, Y.mT) + product(B, B.mT), low, min(STEPS_PER_GRAM, steps - done))
        Y, B = product(P, Y), product(P, B)
    return Y * c


def minimax_polar(X: Tensor, low: float, steps: int) -> Tensor:
    """The polar factor of X (..., m, n), m <= n, of the directions with σ above low ‖XXᵀ‖_F^½, by the same steps."""
    Y = X / entry_maximum(X)
    Y = Y / _root_norm(product(Y, Y.mT))
    lows = torch.full_like(Y[..., :1, :1], low)
    for _ in range(steps):
        P, lows = _compose(product(Y, Y.mT), lows, 1)
        Y = product(P, Y)
    return Y


def steps_to_reach(low: float) -> int:
    """How many steps, with the tabulated coefficients, send [low, 1] to within 1e-4 of one."""
    steps = 1  # the last, from NEARLY on, cubes the distance to one
    while low < NEARLY:
        place = math.ceil(math.log(low) / math.log(LEAST_LOW) * (GRID - 1))
        low = TABLE[min(place, GRID - 1)].low
        steps += 1
    return steps


def _root_norm(R: Tensor) -> Tensor:
    """‖R‖_F^½ as (..., 1, 1): no singular value of Y exceeds it where R = Y Yᵀ. One where R is zero."""
    norm: Tensor = torch.linalg.matrix_norm(R, keepdim=True).sqrt()
    return torch.where(norm == 0, 1.0, norm)


def _compose(R: Tensor, low: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """P(R) with P(R) R^½ near the identity, for R with eigenvalues in [low², 1], and the new low.

    It costs 4·steps − 3 products.
    """
    table = torch.tensor(TABLE, dtype=R.dtype, device=R.device)
    P = None
    for step in range(steps):
        place = (torch.log(low.clamp(LEAST_LOW, 1.0)) / math.log(LEAST_LOW) * (GRID - 1)).ceil().long()
        a, b, c, low = table[place.clamp(0, GRID - 1)].unbind(-1)
        Q = b * R + c * product(R, R)
        Q = Q + torch.diag_embed(a[..., 0].expand(Q.shape[:-1]))
        P = Q if P is None else product(P, Q)
        if step < steps - 1:
            R = product(product(R, Q), Q)
    assert P is not None
    return P, low


def minimax_quintic(low: float) -> Quintic:
    """The odd quintic nearest to 1 on [low, 1] by Remez' exchange, scaled so that it stays in [., 1].

    The error 1 − p(x) takes its extreme value with alternating sign at four points: low, two inner points, and 1.
    """
    if low >= LIMIT_LOW:  # the three points merge: (15x − 10x³ + 3x⁵)/8
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


def _guarded(low: float) -> Quintic:
    """The quintic for [low, 1], stretched by GUARD so that rounding just above one stays harmless.

    The steepest have slope 13 at one: five of them in a row would blow up an excess of 1e-6.
    """
    if low >= LIMIT_LOW:  # flat at one
        return minimax_quintic(low)
    a, b, c, _ = minimax_quintic(low)
    a, b, c = a / GUARD, b / GUARD**3, c / GUARD**5
    return Quintic(a, b, c, a * low + b * low**3 + c * low**5)


def _solve(rows: list[list[float]]) -> list[float]:
    """The solution of a small linear system, its right side in the last column, by elimination with pivoting.

    In plain Python, so that it works while a compiler traces or tensors are fake.
    """
    for i in range(len(rows)):
        rows[i:] = sorted(rows[i:], key=lambda row: -abs(row[i]))
        rows[i] = [value / rows[i][i] for value in rows[i]]
        for j in range(len(rows)):
            if j != i:
                rows[j] = [x - rows[j][i] * y for x, y in zip(rows[j], rows[i], strict=True)]
    return [row[-1] for row in rows]


# The quintics for l = LEAST_LOW^(i/(GRID − 1)), longest interval last. Made on import: a compiler sees constants.
TABLE = [_guarded(LEAST_LOW ** (i / (GRID - 1))) for i in range(GRID)]
