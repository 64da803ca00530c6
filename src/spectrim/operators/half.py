r"""The soft clip and the polar factor in half precision, for lists of stacks, as GPU optimizers use them.

Products are of float16 matrices, accumulated in float32. All stacks have the same smaller side s, so that polynomials
of Gram matrices are computed for one stack of s x s matrices. The host never waits for the device and uploads constants
in the first call only, so a step can be captured in a CUDA graph.

    H_c(X)/c is the first block of the polar factor of [X/c; I], whose singular values are in [1/√(1+σ₁²/c²), 1] · norm.
    It is computed by the five best odd quintics on this interval, from a table. Gram matrices are recomputed after the
    first and the third step, since a half-precision Gram matrix loses singular values below σ₁/100.

The first step determines the rounding error at σ₁/c = 100. It is computed as X + SX with S = (b/a)XXᵀ + (c/a)(XXᵀ)²,
which is small for a small X, and the rounding error of X is added before the sum is rounded.
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

SMALL_SIDE = 128  # below this side float32 is used: it takes no longer, and few rounding errors do not average out
SIZE = 2**3.5  # Frobenius norm of matrices in half precision; the squares of their Gram matrices are below 2^14
NO_CLIP = 24.0  # c over the Frobenius norm, above which clipping changes less than 1e-3
LEAST = 2.0**-11  # the smallest c over the Frobenius norm; smaller thresholds are replaced by it
LEAST_SIZE = 2.0**-24  # lower bound on ‖R²‖_F, the smallest float16, to avoid division by zero


@torch.no_grad()
def half_clip(
    stacks: Sequence[Tensor], thresholds: Sequence[float | Tensor], *, overwrite: bool = False
) -> list[Tensor]:
    r"""Shrink every singular value σ to σ / sqrt(1 + σ²/c²), in half precision.

    The relative Frobenius error is at most 1e-2 for σ₁/c up to 100 (1e-3 if few singular values exceed c). No singular
    value exceeds c by more than 1 % for σ₁/c up to 1000, and 2 % above, where small ones become too small. The result
    is finite for every finite matrix; a matrix with NaN or infinity does not affect others.

    Args:
        stacks: (E, m, n), float32, of any strides; min(m, n) is the same for all.
        thresholds: c > 0 for every stack: a number, or a tensor () or (E,) on its device, which is not checked.
        overwrite: store the results in the stacks' memory.

    Returns:
        Float32 tensors of the stacks' shapes.

    Raises:
        ValueError: a stack has another dtype, number of dimensions or smaller side, or a threshold is not positive.
    """
    _check(stacks)
    if len(thresholds) != len(stacks):
        raise ValueError(f"{len(thresholds)} thresholds for {len(stacks)} stacks: expected one per stack")
    for c in thresholds:
        if not isinstance(c, Tensor) and not c > 0:
            raise ValueError(f"threshold={c}: expected a positive number")
    work = _Work(stacks, overwrite)
    if not work.X:
        return list(stacks)
    unit, low, c = work.scales([thresholds[i] for i in work.nonempty])
    with arithmetic(work.X[0].device, work.dtype):
        gain = work.iterate(CLIP, unit, low)
    return work.results(c * gain)


@torch.no_grad()
def half_polar(stacks: Sequence[Tensor], *, steps: int | None = None, overwrite: bool = False) -> list[Tensor]:
    """Set every singular value to one, in half precision.

    Args:
        stacks: (E, m, n), float32, of any strides; min(m, n) is the same for all.
        steps: None maps singular values above σ₁/100 to within 1 % of one. A number gives a rough result in so many
            steps, like Muon's: no singular value exceeds 1.2, and those that Muon raises to 0.7 are raised at least as
            far; with five steps they are between 0.93 and 1.07, or 0.85 and 1.15 if a kernel computes half of every
            symmetric product.
        overwrite: store the results in the stacks' memory.

    Returns:
        Float32 tensors of the stacks' shapes. Finite for every finite matrix, zero for zero.

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
    """The most bytes that either operator needs per m x n matrix, besides the float32 stack and its result."""
    side, entries = min(m, n), m * n
    # The larger of computing a polynomial and applying it to the only stack of a call.
    numbers = max(entries + 5 * side**2, 2 * entries + 2 * side**2)
    return numbers * (2 if side >= SMALL_SIDE else 4)


class _Work:
    """The nonempty stacks of one call, transposed if they are column-major, and their half-precision iterates Y."""

    def __init__(self, stacks: Sequence[Tensor], overwrite: bool) -> None:
        self.stacks, self.overwrite = stacks, overwrite
        self.nonempty = [i for i, X in enumerate(stacks) if X.numel() > 0]
        self.transposed = [stacks[i].stride(-2) == 1 and stacks[i].stride(-1) != 1 for i in self.nonempty]
        self.X = [stacks[i].mT if turn else stacks[i] for i, turn in zip(self.nonempty, self.transposed, strict=True)]
        self.counts = [len(X) for X in self.X]
        self.dtype = torch.float16 if self.X and min(self.X[0].shape[1:]) >= SMALL_SIDE else torch.float32
        self.Y: list[Tensor] = []

    def scales(self, thresholds: Sequence[float | Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The factor on X, the lower end of the interval, and the threshold of every matrix, (E,)."""
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
        """Apply a program's quintics to Y = unit X, or to [Y; low I], for unit in float64 and low in float32, (E,).

        P(R) multiplies Y after every stage, and B = low I after all but the last, since only B's Gram matrix is used.

        Returns:
            The factor (E,) by which the result, in Y, must be multiplied.
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
        """The smaller one of YYᵀ and YᵀY for all matrices, with ``plus``, (E,), added to the diagonal."""
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
        # Let ``lost`` be the rounding error of S − I on the diagonal. Up to first order in rounding errors,
        # (S − I) unit X = S Y − (unit X − Y) + lost unit X. The last two terms are at most a unit in the last place of
        # Y, so half precision suffices for them.
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
        """gain Y in float32, in the stacks' memory or in new tensors. Empty stacks are returned as they are."""
        results = list(self.stacks)
        scaled = _scaled(self.Y, gain, torch.float32, self.X if self.overwrite else None)
        for place, transposed, result in zip(self.nonempty, self.transposed, scaled, strict=True):
            results[place] = result.mT if transposed else result
        return results


def _compose(parts: list[Tensor], count: int, numbers: Iterator[Tensor]) -> Tensor:
    """The product of the steps' Q, from [R] or [R, R²] in the first step's units. Empties the list."""
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
    """A program's coefficients for every matrix, (numbers, E), from R² and the lower end of its interval, (E,)."""
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.spectrim.half_numbers(square, low, name)
        return result
    return _look_up(square, low, name)


def _look_up(square: Tensor, low: Tensor | None, name: str) -> Tensor:
    rows, powers, lows = program(name)
    table = constant((name, "numbers"), square, lambda: list(zip(*rows, strict=True)))
    exponents = constant((name, "powers"), square, lambda: [[-power / 2] for power in powers])
    # Row i is for l = low/‖R²‖_F^¼ >= lows[i], and the last one for all smaller l.
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
    """Stacks times a factor (E,) per matrix in another dtype, in ``out`` if given, without wider intermediate tensors.

    With ``other``, one stack plus the other stack times ``of_other``.
    """
    if torch.compiler.is_compiling():
        counts = [len(X) for X in stacks]
        results = [(X * f).to(dtype) for X, f in zip(stacks, torch.split(_of_matrices(factors), counts), strict=True)]
        if other is not None and of_other is not None:
            results = [(results[0] + other * _of_matrices(of_other)).to(dtype)]
        return results if out is None else [place.copy_(result) for place, result in zip(out, results, strict=True)]
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
            shapes = ", ".join(str(tuple(stack.shape)) for stack in stacks)
            raise ValueError(f"stacks of shapes {shapes}: expected one smaller side")
