r"""Programs of odd quintics for half precision: the numbers that :mod:`spectrim.operators.half` runs, as plain lists.

A step X ← X(aI + bR + cR²) with R = XXᵀ sends singular values in [l, 1] to a narrower interval. Steps that share one
Gram matrix form a stage, in which R is carried along by R ← RQ². So that each Q takes one product and no scaling, R is
kept in units in which the coefficient of R² is one,

    Q = αI + βR + R²,   α = θa,   β = b√(θ/c),   R in units of 1/√(θc),   θ such that RQ² has the units of the next.

A first stage of one step is kept as a(I + S), S = (b/a)R + (c/a)R²: rounding to half precision is then relative to S,
which is small where R is, and not to aI. It is taken with the opposite sign, which suits a product that is added to.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from .minimax import Quintic, minimax_quintic

__all__ = ["CLIP", "POLAR", "Program", "program", "rough_polar", "stages"]

CLIP, POLAR = "clip", "polar"

ACCURATE = (1, 2, 2)  # steps of each stage; three from one Gram matrix triple the error at σ₁/c = 100
REACH = 4e-3  # 1/230: σ₁/c = 100 where the norm is overestimated by m^(1/8) = 2.3
LEAST_LOW = 2.5e-4  # intervals that reach further down are treated like this one
ROWS = 96  # intervals tabulated for the clip, equally spaced in log l
SLACK = 1.005  # how much the rounded norm of R is taken to be too small
GUARD = 1.01  # every interval is taken this much longer at its upper end, while quintics are steep there
FLAT = 0.85  # from here on they are not
CENTRED = 0.99  # the clip's last step is centred on one if it ends as narrow as this: above one by 0.5 % at most
MOST_CENTRED = 1.2  # and the polar factor's always, but none is larger, as with Muon's steps
MUON_SLOPE, MUON_LEAST = 3.4445, 0.7  # the slope of Muon's quintic at zero, and the least value it settles at


class Program(NamedTuple):
    """What the steps need, in the order of use, as rows of numbers and the power of g that each is multiplied by.

    g = 1/‖R²‖_F^½ belongs to each matrix. Row i of the clip serves intervals from lows[i] on.
    """

    rows: list[list[float]]
    powers: list[float]
    lows: list[float]


def stages(name: str) -> tuple[int, ...]:
    """How many steps each stage has, for the clip, the accurate polar factor, or the one named by `rough_polar`."""
    if name in (CLIP, POLAR):
        return ACCURATE
    steps = int(name.removeprefix(POLAR))
    # In pairs, and three at the end of an odd number.
    return (2,) * (steps // 2 - 1) + (2 + steps % 2,) if steps > 1 else (1,)


@functools.cache
def program(name: str) -> Program:
    """The numbers that go with :func:`stages`."""
    if name == CLIP:
        lows = [0.9 * (LEAST_LOW / 0.9) ** (i / (ROWS - 1)) for i in range(ROWS)]
    elif name == POLAR:
        lows = [REACH]
    else:
        lows = [MUON_LEAST / MUON_SLOPE ** int(name.removeprefix(POLAR))]
    rows = [_numbers(low, stages(name), bounded=name == CLIP) for low in lows]
    return Program([[value for value, _ in row] for row in rows], [power for _, power in rows[0]], lows)


def rough_polar(steps: int) -> str:
    """The name of the program that lifts at least as much as so many steps of Muon's, with as many of its own."""
    return f"{POLAR}{steps}"


def _numbers(low: float, stages: tuple[int, ...], *, bounded: bool) -> list[tuple[float, float]]:
    """Numbers with their powers of g. ``unit`` is the size of the true X over that of the X computed with."""
    numbers: list[tuple[float, float]] = []
    unit = 1.0
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
    """θ of every step: one at the last, and before it such that θ' c' = θ⁵ c for the step θ', c' that follows."""
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
