r"""Coefficients of the odd quintics that :mod:`spectrim.operators.half` applies in half precision.

A step X ← X(aI + bR + cR²) with R = XXᵀ maps singular values in [l, 1] to a narrower interval. A stage is the steps
that share one Gram matrix; after each, R ← RQ². R is scaled so that its square has the coefficient 1; then Q takes one
product and no scaling:

    Q = αI + βR + R²,   α = θa,   β = b√(θ/c),   R in units of 1/√(θc),   θ such that RQ² has the next step's units.

A first stage of one step is stored as a(I + S), S = (b/a)R + (c/a)R², so that rounding to half precision is relative to
S, which is small for a small R, and not to aI. Its sign is reversed for products that subtract.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from .minimax import Quintic, minimax_quintic

__all__ = ["CLIP", "POLAR", "Program", "program", "rough_polar", "stages"]

CLIP, POLAR = "clip", "polar"

ACCURATE = (1, 2, 2)  # steps of each stage; a stage of three would triple the error at σ₁/c = 100
REACH = 4e-3  # 1/230: σ₁/c = 100, if the norm is overestimated by m^(1/8) = 2.3
LEAST_LOW = 2.5e-4  # the smallest lower end of an interval; smaller ones are treated like this one
ROWS = 96  # intervals tabulated for the clip, equally spaced in log l
SLACK = 1.005  # bound on the factor by which the rounded norm of R is too small
GUARD = 1.01  # factor by which an interval's upper end is raised for steep quintics
FLAT = 0.85  # quintics are steep at the upper end of intervals whose lower end is below this
CENTRED = 0.99  # the clip's result is centred on 1 if its lower end is above this; it exceeds 1 by at most 0.5 %
MOST_CENTRED = 1.2  # the polar factor's result is always centred, but at most multiplied by this
MUON_SLOPE, MUON_LEAST = 3.4445, 0.7  # the slope of Muon's quintic at zero, and its smallest converged value


class Program(NamedTuple):
    """Rows of coefficients in the order of use, and the power of g = 1/‖R²‖_F^½ that multiplies each of them.

    Row i is for intervals whose lower end is at least lows[i].
    """

    rows: list[list[float]]
    powers: list[float]
    lows: list[float]


def stages(name: str) -> tuple[int, ...]:
    """The number of steps of every stage, for a name: CLIP, POLAR or one by :func:`rough_polar`."""
    if name in (CLIP, POLAR):
        return ACCURATE
    steps = int(name.removeprefix(POLAR))
    # Stages of two steps; the last one has three if the number is odd.
    return (2,) * (steps // 2 - 1) + (2 + steps % 2,) if steps > 1 else (1,)


@functools.cache
def program(name: str) -> Program:
    """The coefficients of the steps in :func:`stages`."""
    if name == CLIP:
        lows = [0.9 * (LEAST_LOW / 0.9) ** (i / (ROWS - 1)) for i in range(ROWS)]
    elif name == POLAR:
        lows = [REACH]
    else:
        lows = [MUON_LEAST / MUON_SLOPE ** int(name.removeprefix(POLAR))]
    rows = [_numbers(low, stages(name), bounded=name == CLIP) for low in lows]
    return Program([[value for value, _ in row] for row in rows], [power for _, power in rows[0]], lows)


def rough_polar(steps: int) -> str:
    """The name of a program of so many steps, which raise small singular values at least as much as Muon's steps."""
    return f"{POLAR}{steps}"


def _numbers(low: float, stages: tuple[int, ...], *, bounded: bool) -> list[tuple[float, float]]:
    """The coefficients of a row with their powers of g."""
    numbers: list[tuple[float, float]] = []
    unit = 1.0  # the exact X over the computed X
    for stage, count in enumerate(stages):
        quintics = []
        for _ in range(count):
            quintics.append(_guarded(low))
            low = min(1.0, quintics[-1].low)
        if stage == 0 and count == 1:
            a, b, c, _ = quintics[0]
            numbers += [(-c / a, 2), (-b / a, 1)]
            unit *= -a
            continue
        theta = _thetas(quintics)
        scale = math.sqrt(theta[0] * quintics[0].c)
        numbers.append((scale * unit**2, 1))
        if stage == 0:
            numbers.append((scale**2, 2))
        for t, (a, b, c, _) in zip(theta, quintics, strict=True):
            numbers += [(t * a, 0), (b * math.sqrt(t / c), 0)]
        unit /= math.prod(theta)
    centred = min(2 / (1 + low), MOST_CENTRED) if low > CENTRED or not bounded else 1.0
    numbers.append((unit * centred, 0.5))
    return [(value / SLACK**power, power) for value, power in numbers]


def _thetas(quintics: list[Quintic]) -> list[float]:
    """θ of every step: 1 for the last; for others such that θ' c' = θ⁵ c, where θ', c' are of the next step."""
    theta = [1.0]
    for earlier, later in zip(quintics[-2::-1], quintics[:0:-1], strict=True):
        theta.insert(0, (theta[0] * later.c / earlier.c) ** 0.2)
    return theta


def _guarded(low: float) -> Quintic:
    if low >= FLAT:
        return minimax_quintic(low)
    a, b, c, _ = minimax_quintic(low)
    a, b, c = a / GUARD, b / GUARD**3, c / GUARD**5
    return Quintic(a, b, c, a * low + b * low**3 + c * low**5)
