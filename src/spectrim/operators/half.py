r"""The soft clip and the polar factor in half precision, for lists of stacks: the operators of a step on a GPU.

Products are of float16 matrices, summed in float32. All stacks share their smaller side s, so that what happens between
the products with the matrices themselves is done once, on one stack of s x s matrices. Nothing waits for the device,
and nothing is sent to it after the first call: a step can be captured in a CUDA graph.

    H_c(X)/c is the first block of the polar factor of [X/c; I], whose singular values lie in [1/√(1+σ₁²/c²), 1] · norm:
    five odd quintics, best on that interval, looked up for each matrix. Gram matrices are taken anew after the first
    and the third, for rounding one in half precision drowns what lies 100 times below the largest value.

What rounding costs at σ₁/c = 100 is decided by the first step. It is taken as X + SX with S = (b/a)XXᵀ + (c/a)(XXᵀ)²,
which vanishes where X is small, and what X loses when it is rounded is added before the sum is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spectrim.kernels.stacks import SMALLEST, clip_scales, combine, frobenius_norms, program_numbers
from spectrim.kernels.symmetric import product_less

from ._constants import constant
from ._stack_product import (
    arithmetic,
    by_kernel,
    gram,
    half_product,
    product_added,
    square_plus,
    square_plus_scaled,
    symmetric_product,
)
from .quintics import CLIP, POLAR, SLACK, program, rough_polar, stages

__all__ = ["half_clip", "half_polar", "half_workspace"]

SMALL_SIDE = 128  # below it few roundings make an entry, errors do not average out, and float32 costs nothing
SIZE = 2**3.5  # Frobenius norm of a matrix in half precision: the square of its Gram matrix stays below 2^14
NO_CLIP = 24.0  # c over the Frobenius norm from which on clipping changes less than 1e-3
LEAST = 2.0**-11  # c over the Frobenius norm that is told from none
LEAST_SIZE = 2.0**-24  # of ‖R²‖_F: the least in float16, so that a matrix of zeros divides by something


@torch.no_grad()
def half_clip(
    stacks: Sequence[Tensor], thresholds: Sequence[float | Tensor], *, overwrite: bool = False
) -> list[Tensor]:
    r"""Shrink every singular value σ to σ / sqrt(1 + σ²/c²), in half precision.

    The relative Frobenius error is at most 1e-2 for σ₁/c up to 100 (1e-3 where few values exceed c). No singular value
    exceeds c by more than 1 % up to σ₁/c = 1000, or 2 % beyond, where small ones come out too small. The result is
    finite for every finite input; a matrix that is not finite spoils no other.

    Args:
        stacks: (E, m, n), float32, of any strides; min(m, n) is the same for all.
        thresholds: c > 0 for each stack: a number, or a tensor () or (E,) on its device, which is not read.
        overwrite: the stacks are not needed any more. The results take their place.

    Returns:
        For each stack a float32 tensor of its shape.

    Raises:
        ValueError: a stack has another dtype, number of dimensions or smaller side, or a threshold is not positive.
    """
    _check(stacks)
    if len(thresholds) != len(stacks):
        raise ValueError(f"{len(thresholds)} thresholds for {len(stacks)} stacks: expected one for each")
    for c in thresholds:
        if not isinstance(c, Tensor) and not c > 0:
            raise ValueError(f"threshold={c}: expected a positive number")
    work = _Work(stacks, overwrite)
    if not work.X:
        return list(stacks)
    unit, low, c = work.scales([thresholds[i] for i in work.filled])
    with arithmetic(work.X[0].device, work.dtype):
        gain = work.iterate(CLIP, unit, low)
    return work.results(c * gain)


@torch.no_grad()
def half_polar(stacks: Sequence[Tensor], *, steps: int | None = None, overwrite: bool = False) -> list[Tensor]:
    """Set every singular value to one, in half precision.

    Args:
        stacks: (E, m, n), float32, of any strides; min(m, n) is the same for all.
        steps: None sends singular values from σ₁/100 on to within 1 % of one. A number asks for the rough result of so
            many steps of Muon's: none exceeds 1.2, and what Muon's lift to 0.7 is lifted as far; five of them leave it
            between 0.93 and 1.07, or 0.85 and 1.15 where a kernel computes half of each symmetric product.
        overwrite: the stacks are not needed any more. The results take their place.

    Returns:
        For each stack a float32 tensor of its shape. Finite for every finite input, zero for zero.

    Raises:
        ValueError: a stack has another dtype, number of dimensions or smaller side, or steps is not positive.
    """
    _check(stacks)
    if steps is not None and steps < 1:
        raise ValueError(f"steps={steps}: expected a positive integer")
    work = _Work(stacks, overwrite)
    if not work.X:
        return list(stacks)
    unit = SIZE / frobenius_norms(work.X).clamp_min_(SMALLEST)
    with arithmetic(work.X[0].device, work.dtype):
        gain = work.iterate(POLAR if steps is None else rough_polar(steps), unit, None)
    return work.results(gain)


def half_workspace(m: int, n: int) -> int:
    """The most bytes that either operator needs for each m x n matrix, beside the float32 stack and its result."""
    side, entries = min(m, n), m * n
    # While a polynomial is composed, and while it is applied to a stack that makes up all of the call.
    numbers = max(entries + 5 * side**2, 2 * entries + 2 * side**2)
    return numbers * (2 if side >= SMALL_SIDE else 4)


class _Work:
    """The stacks of one call: those with entries, each the way it lies in memory, and their half-precision forms."""

    def __init__(self, stacks: Sequence[Tensor], overwrite: bool) -> None:
        self.stacks, self.overwrite = stacks, overwrite
        self.filled = [i for i, X in enumerate(stacks) if X.numel() > 0]
        self.turned = [stacks[i].stride(-2) == 1 and stacks[i].stride(-1) != 1 for i in self.filled]
        self.X = [stacks[i].mT if turn else stacks[i] for i, turn in zip(self.filled, self.turned, strict=True)]
        self.counts = [len(X) for X in self.X]
        self.dtype = torch.float16 if self.X and min(self.X[0].shape[1:]) >= SMALL_SIDE else torch.float32
        self.Y: list[Tensor] = []

    def scales(self, thresholds: Sequence[float | Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The factor on X, the lower end of its interval, and the threshold of every matrix, (E,)."""
        first = thresholds[0]
        if all(c is first or (not isinstance(c, Tensor) and c == first) for c in thresholds) and (
            not isinstance(first, Tensor) or first.ndim == 0 or len(thresholds) == 1
        ):
            c = first
        else:
            like = torch.empty(0, device=self.X[0].device)
            parts = zip(thresholds, self.counts, strict=True)
            c = torch.cat([c.expand(n) if isinstance(c, Tensor) else like.new_full((n,), c) for c, n in parts])
        return clip_scales(self.X, c, size=SIZE, most=NO_CLIP, least=LEAST)

    def iterate(self, name: str, unit: Tensor, low: Tensor | None) -> Tensor:
        """Run a program on Y = unit X, or on [Y; low I], for unit in float64 and low in float32, (E,).

        P(R) is applied to Y after each stage, and to B = low I, of which only BBᵀ matters, in between.

        Returns:
            The factor by which the result, which is in Y, is too small, (E,).
        """
        self.Y = _scaled(self.X, unit, self.dtype)
        R = self.grams(None if low is None else low.square())
        square = symmetric_product(R, R)
        numbers = iter(_numbers(square, low, name).unbind())
        counts = stages(name)
        B = None
        for stage, count in enumerate(counts):
            if stage == 0 and count == 1:
                S = _scaled([square], next(numbers), self.dtype, [square], R, next(numbers))[0]
                del R, square
                P = self._first_step(S, unit)
                del S
                if low is not None:
                    B = _scaled([P], low, self.dtype, [P])[0]
                del P
                continue
            if stage == 0:
                parts = [R.mul_(_of_matrices(next(numbers))), square.mul_(_of_matrices(next(numbers)))]
                del square
            else:
                R = self.grams()
                number = next(numbers)
                parts = [R.mul_(_of_matrices(number)) if B is None else square_plus_scaled(B, R, number)]
            del R
            P = _compose(parts, count, numbers)
            if B is not None:
                B = symmetric_product(P, B) if stage < len(counts) - 1 else None
            self._apply(P)
            del P
        return next(numbers)

    def grams(self, plus: Tensor | None = None) -> Tensor:
        """YYᵀ or YᵀY, whichever is small, for all matrices; with ``plus``, (E,), on the diagonal."""
        side = min(self.Y[0].shape[1:])
        R = self.Y[0].new_empty(sum(self.counts), side, side)
        shifts = [None] * len(self.Y) if plus is None else torch.split(plus, self.counts)
        for Y, place, shift in zip(self.Y, torch.split(R, self.counts), shifts, strict=True):
            gram(Y if _wide(Y) else Y.mT, place, shift)
        return R

    def _apply(self, P: Tensor) -> None:
        """Y ← P Y, on the smaller side."""
        for i, p in enumerate(torch.split(P, self.counts)):
            Y = self.Y[i]
            self.Y[i] = half_product(p, Y) if _wide(Y) else half_product(Y, p.mT)

    def _first_step(self, S: Tensor, unit: Tensor) -> Tensor:
        """Y ← S Y − unit X, rounded once.

        Returns:
            S − I, in S's memory.
        """
        if by_kernel(S):
            for i, (s, u) in enumerate(zip(*(torch.split(x, self.counts) for x in (S, unit)), strict=True)):
                X, Y = self.X[i], self.Y[i]
                self.Y[i] = product_less(s, Y, X, u) if _wide(Y) else product_less(s, Y.mT, X.mT, u).mT
            _diagonal(S).sub_(1)
            return S
        # (S − I) unit X = S Y − (unit X − Y) + lost unit X in exact numbers, to first order in what is lost when ones
        # are taken from the diagonal and when Y is rounded. The last two terms are a unit in the last place of Y at
        # most: half precision will do for them.
        exact = _diagonal(S).float() - 1
        lost = exact - _diagonal(S).copy_(exact)
        unit = unit[:, None]
        units = torch.split(torch.addcmul(unit, unit, lost, value=-1).unsqueeze(-1), self.counts)
        for i, (s, X, v) in enumerate(zip(torch.split(S, self.counts), self.X, units, strict=True)):
            Y = self.Y[i]
            wide = _wide(Y)
            v = v if wide else v.mT
            if torch.compiler.is_compiling():
                rest = (Y - X * v).to(self.dtype)
            else:
                rest = torch.addcmul(Y, X, v, value=-1, out=torch.empty_like(Y))
            self.Y[i] = product_added(rest, s, Y) if wide else product_added(rest, Y, s.mT)
        return S

    def results(self, gain: Tensor) -> list[Tensor]:
        """gain Y in float32, in the place of the stacks or in new ones. A stack without entries stands for itself."""
        found = list(self.stacks)
        scaled = _scaled(self.Y, gain, torch.float32, self.X if self.overwrite else None)
        for place, turned, result in zip(self.filled, self.turned, scaled, strict=True):
            found[place] = result.mT if turned else result
        return found


def _compose(parts: list[Tensor], count: int, numbers: Iterator[Tensor]) -> Tensor:
    """The product of the Q of so many steps, from [R] or [R, R²] in the first one's units. Empties the list."""
    P: Tensor | None = None
    R = parts.pop(0)
    for step in range(count):
        alpha, beta = next(numbers), next(numbers)
        Q = square_plus(R, beta, alpha, parts.pop() if parts else None)
        P = Q if P is None else symmetric_product(P, Q)
        if step < count - 1:
            R = symmetric_product(R, Q)
            R = symmetric_product(R, Q)
    assert P is not None
    return P


def _numbers(square: Tensor, low: Tensor | None, name: str) -> Tensor:
    """What each matrix needs of a program, (numbers, E), for R² and the lower end of its interval, (E,)."""
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.spectrim.half_numbers(square, low, name)
        return result
    return _look_up(square, low, name)


def _look_up(square: Tensor, low: Tensor | None, name: str) -> Tensor:
    rows, powers, lows = program(name)
    table = constant((name, "numbers"), square, lambda: list(zip(*rows, strict=True)))
    exponents = constant((name, "powers"), square, lambda: [[-power / 2] for power in powers])
    # Row i serves l = low/‖R²‖_F^¼ >= lows[i], and the last one all that is left.
    ends = low if low is None else constant((name, "ends"), square, lambda: [(SLACK * x**2) ** -2 for x in lows[:-1]])
    return program_numbers(square, low, table, exponents, ends, smallest=LEAST_SIZE)


torch.library.custom_op("spectrim::half_numbers", _look_up, mutates_args=()).register_fake(
    lambda square, low, name: square.new_empty(len(program(name).powers), len(square), dtype=torch.float32)
)


def _scaled(
    stacks: Sequence[Tensor],
    factors: Tensor,
    dtype: torch.dtype,
    out: Sequence[Tensor] | None = None,
    other: Tensor | None = None,
    of_other: Tensor | None = None,
) -> list[Tensor]:
    """Stacks times a factor for each matrix, (E,), in another dtype; of one stack, plus another times a factor.

    Without a tensor of a wider dtype in between; into ``out`` where it is given.
    """
    if torch.compiler.is_compiling():
        counts = [len(X) for X in stacks]
        results = [(X * f).to(dtype) for X, f in zip(stacks, torch.split(_of_matrices(factors), counts), strict=True)]
        if other is not None and of_other is not None:
            results = [(results[0] + other * _of_matrices(of_other)).to(dtype)]
        return results if out is None else [place.copy_(found) for place, found in zip(out, results, strict=True)]
    targets = [torch.empty_like(X, dtype=dtype) for X in stacks] if out is None else list(out)
    combine(targets, stacks, factors, None if other is None else [other], of_other)
    return targets


def _of_matrices(numbers: Tensor) -> Tensor:
    return numbers.view(-1, 1, 1)


def _diagonal(R: Tensor) -> Tensor:
    return R.diagonal(dim1=-2, dim2=-1)


def _wide(Y: Tensor) -> bool:
    return Y.shape[-2] <= Y.shape[-1]


def _check(stacks: Sequence[Tensor]) -> None:
    for X in stacks:
        if X.ndim != 3 or X.dtype != torch.float32:
            raise ValueError(f"a stack of shape {tuple(X.shape)} and dtype {X.dtype}: expected (E, m, n) in float32")
        if min(X.shape[1:]) != min(stacks[0].shape[1:]):
            shapes = ", ".join(str(tuple(each.shape)) for each in stacks)
            raise ValueError(f"stacks of shapes {shapes}: expected one smaller side for all")
