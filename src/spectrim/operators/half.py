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

from ._constants import constant
from ._stack_product import arithmetic, half_product, product_added, square_plus, symmetric_product
from .quintics import CLIP, POLAR, SLACK, program, rough_polar, stages

__all__ = ["half_clip", "half_polar", "half_workspace"]

SMALL_SIDE = 128  # below it few roundings make an entry, errors do not average out, and float32 costs nothing
SIZE = 2**3.5  # Frobenius norm of a matrix in half precision: the square of its Gram matrix stays below 2^14
NO_CLIP = 24.0  # c over the Frobenius norm from which on clipping changes less than 1e-3
LEAST = 2.0**-11  # c over the Frobenius norm that is told from none
LEAST_SIZE = 2.0**-24  # of ‖R²‖_F: the least in float16, so that a matrix of zeros divides by something
SMALLEST = 1e-300  # a norm below counts as this one
LARGEST = 3e38  # and a threshold above as this one


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
    norm = work.norms()
    c = _thresholds([thresholds[i] for i in work.filled], work.counts, (NO_CLIP * norm).clamp_max(LARGEST))
    unit = SIZE / torch.hypot(norm, c)
    low = (c * unit).clamp_min(SIZE * LEAST).float().view(-1, 1, 1)
    with arithmetic(work.X[0].device, work.dtype):
        gain = work.iterate(CLIP, unit.unsqueeze(-1), low)
    return work.results(c.float().view(-1, 1, 1) * gain)


@torch.no_grad()
def half_polar(stacks: Sequence[Tensor], *, steps: int | None = None, overwrite: bool = False) -> list[Tensor]:
    """Set every singular value to one, in half precision.

    Args:
        stacks: (E, m, n), float32, of any strides; min(m, n) is the same for all.
        steps: None sends singular values from σ₁/100 on to within 1 % of one. A number asks for the rough result of so
            many steps of Muon's: none exceeds 1.2, and what Muon's lift to 0.7 is lifted as far; five of them leave it
            between 0.93 and 1.07.
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
    unit = (SIZE / work.norms()).unsqueeze(-1)
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

    def norms(self) -> Tensor:
        """Frobenius norms (E,) in float64, which holds them and their reciprocals for all float32 numbers."""
        norms = [torch.linalg.vector_norm(X, dim=(-2, -1), dtype=torch.float64) for X in self.X]
        return _joined(norms).clamp_min(SMALLEST)

    def iterate(self, name: str, unit: Tensor, low: Tensor | None) -> Tensor:
        """Run a program on Y = unit X, or on [Y; low I], for unit (E, 1) in float64 and low (E, 1, 1).

        P(R) is applied to Y after each stage, and to B = low I, of which only BBᵀ matters, in between.

        Returns:
            The factor by which the result, which is in Y, is too small, (E, 1, 1).
        """
        units = torch.split(unit.unsqueeze(-1), self.counts)
        self.Y = [_scaled(X, u, self.dtype) for X, u in zip(self.X, units, strict=True)]
        R = self.grams()
        if low is not None:
            _diagonal(R).add_(low[..., 0].square())
        square = symmetric_product(R, R)
        size = torch.linalg.vector_norm(square, dim=(-2, -1), dtype=torch.float32)
        found = _numbers(size, None if low is None else low[:, 0, 0], name)
        numbers = iter(found.view(*found.shape, 1, 1).unbind(1))
        counts = stages(name)
        B = None
        for stage, count in enumerate(counts):
            if stage == 0 and count == 1:
                P = square.mul_(next(numbers)).addcmul_(R, next(numbers))  # −S
                del R, square
                self._first_step(P, unit)
                if low is not None:
                    B = P.mul_(low)
                continue
            if stage == 0:
                parts = [R.mul_(next(numbers)), square.mul_(next(numbers))]
                del square
            else:
                R = self.grams()
                if B is not None:
                    R = symmetric_product(B, B, plus=R)
                parts = [R.mul_(next(numbers))]
            del R
            P = _compose(parts, count, numbers)
            if B is not None:
                B = symmetric_product(P, B) if stage < len(counts) - 1 else None
            self._apply(P)
            del P
        return next(numbers)

    def grams(self) -> Tensor:
        """YYᵀ or YᵀY, whichever is small, for all matrices."""
        side = min(self.Y[0].shape[1:])
        R = self.Y[0].new_empty(sum(self.counts), side, side)
        for Y, place in zip(self.Y, torch.split(R, self.counts), strict=True):
            symmetric_product(*((Y, Y.mT) if _wide(Y) else (Y.mT, Y)), out=place)
        return R

    def _apply(self, P: Tensor) -> None:
        """Y ← P Y, on the smaller side."""
        for i, p in enumerate(torch.split(P, self.counts)):
            Y = self.Y[i]
            self.Y[i] = half_product(p, Y) if _wide(Y) else half_product(Y, p.mT)

    def _first_step(self, S: Tensor, unit: Tensor) -> None:
        """S ← S − I and Y ← S Y, with what is lost when ones are taken from the diagonal and when Y is rounded.

        (S − I) unit X = S Y − (unit X − Y) + lost unit X in exact numbers, to first order in what is lost. The last two
        terms are a unit in the last place of Y at most: half precision will do for them.
        """
        exact = _diagonal(S).float() - 1
        lost = exact - _diagonal(S).copy_(exact)
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

    def results(self, gain: Tensor) -> list[Tensor]:
        """gain Y in float32, in the place of the stacks or in new ones. A stack without entries stands for itself."""
        found = list(self.stacks)
        gains = torch.split(gain, self.counts)
        for i, factor in enumerate(gains):
            Y = self.Y.pop(0)  # whose memory is free once it is read
            result = _scaled(Y, factor, torch.float32, self.X[i] if self.overwrite else None)
            found[self.filled[i]] = result.mT if self.turned[i] else result
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


def _numbers(size: Tensor, low: Tensor | None, name: str) -> Tensor:
    """What each matrix needs of a program, (E, numbers), for size = ‖R²‖_F and the lower end of its interval, (E,)."""
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.spectrim.half_numbers(size, low, name)
        return result
    return _look_up(size, low, name)


def _look_up(size: Tensor, low: Tensor | None, name: str) -> Tensor:
    rows, powers, lows = program(name)
    table = constant((name, "rows"), size, lambda: rows)
    size = size.clamp_min(LEAST_SIZE)
    if low is not None:
        # Row i serves l = low/‖R²‖_F^¼ >= lows[i], and the last one all that is left.
        ends = constant((name, "ends"), size, lambda: [(SLACK * low**2) ** -2 for low in lows[:-1]])
        table = table[torch.bucketize(size / low**4, ends)]
    return table * size[:, None] ** constant((name, "powers"), size, lambda: [-power / 2 for power in powers])


torch.library.custom_op("spectrim::half_numbers", _look_up, mutates_args=()).register_fake(
    lambda size, low, name: size.new_empty(len(size), len(program(name).powers))
)


def _thresholds(values: Sequence[float | Tensor], counts: Sequence[int], most: Tensor) -> Tensor:
    """One threshold for each matrix, (E,), but at most ``most``. A number is not sent to the device."""
    first = values[0]
    if all(value is first or (not isinstance(value, Tensor) and value == first) for value in values):
        if not isinstance(first, Tensor):
            return most.clamp_max(first)
        if first.ndim == 0 or len(values) == 1:
            return torch.minimum(most, first)
    parts = [
        c.expand(count) if isinstance(c, Tensor) else most.new_full((count,), c)
        for c, count in zip(values, counts, strict=True)
    ]
    return torch.minimum(most, torch.cat(parts))


def _scaled(X: Tensor, factor: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """factor X in another dtype without a tensor of the wider one in between; into ``out`` where it is given."""
    if torch.compiler.is_compiling():
        result = (X * factor).to(dtype)
        return result if out is None else out.copy_(result)
    return torch.mul(X, factor, out=torch.empty_like(X, dtype=dtype) if out is None else out)


def _diagonal(R: Tensor) -> Tensor:
    return R.diagonal(dim1=-2, dim2=-1)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _wide(Y: Tensor) -> bool:
    return Y.shape[-2] <= Y.shape[-1]


def _check(stacks: Sequence[Tensor]) -> None:
    for X in stacks:
        if X.ndim != 3 or X.dtype != torch.float32:
            raise ValueError(f"a stack of shape {tuple(X.shape)} and dtype {X.dtype}: expected (E, m, n) in float32")
        if min(X.shape[1:]) != min(stacks[0].shape[1:]):
            shapes = ", ".join(str(tuple(each.shape)) for each in stacks)
            raise ValueError(f"stacks of shapes {shapes}: expected one smaller side for all")
