"""What clipping and shrinking leave of a gradient's mean, and what of its noise.

An operator that kept all of the mean G and none of the noise N would be perfect. Multiplying by a number s keeps a
share s of G and s² of the noise's variance, which a learning rate does as well; so an operator is worth something
where the noise it leaves is below the square of the signal it leaves. Operators are compared at equal energy left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from spectrim.monitor.gradient_stacks import Decomposed, Estimate, check_stack, decompose, jackknife
from spectrim.monitor.sketch import sample_stride, wide
from spectrim.operators import smooth_shrink

__all__ = ["ENERGIES", "OPERATORS", "Operator", "Remains", "remains", "remains_at"]

Operator = Literal["soft clip", "hard clip", "shrink", "clamp", "norm"]
OPERATORS: tuple[Operator, ...] = get_args(Operator)
"""Spectral clipping of either form at c, the redescending shrinkage and the clamp of entries at τ, and the bound c on
the Frobenius norm of the matrix."""

ENERGIES = (0.9, 0.5, 0.2, 0.05)
"""Shares of E‖g‖_F² at which operators are compared, unless others are given."""

SAMPLE = 2**16
"""Entries of a stack by which the strength of an entry-wise operator is found; what it leaves is taken from all."""


@dataclass(frozen=True, kw_only=True)
class Remains:
    """What an operator leaves.

    Attributes:
        operator: which.
        strength: c or τ, in the units of singular values, of entries or of the norm: smaller is stronger.
        energy: E‖op(g)‖_F²/E‖g‖_F².
        signal: ⟨E op(g), G⟩/‖G‖_F², with the standard error of a jackknife over batches.
        noise: the variance of op(g) over batches, all entries together, over that of g.
    """

    operator: Operator
    strength: float
    energy: float
    signal: Estimate
    noise: float

    @property
    def gain(self) -> float:
        """Signal squared over noise: 1 is what scaling does, above 1 more of the mean than of the noise is left."""
        return self.signal.value**2 / self.noise if self.noise > 0 else math.nan


def remains(
    gradients: Tensor, *, energies: Sequence[float] = ENERGIES, decomposed: Decomposed | None = None
) -> list[Remains]:
    """Every operator at strengths that leave the same share of the energy.

    Args:
        gradients: (K, m, n), one matrix's gradient on each of K >= 4 independent batches.
        energies: shares of E‖g‖_F² that are to be left, each in (0, 1).
        decomposed: of :func:`~spectrim.monitor.gradient_stacks.decompose` on the wide stack, where that is at hand.

    Raises:
        ValueError: a stack without energy, or a share outside its range.

    Held beside the stack: its left singular vectors, and one sum of the matrix's shape.
    """
    for energy in energies:
        if not 0 < energy < 1:
            raise ValueError(f"energies={tuple(energies)}: expected shares between 0 and 1")
    stack = _Stack(gradients, decomposed)
    return [stack.apply(operator, stack.strength(operator, energy)) for operator in OPERATORS for energy in energies]


def remains_at(
    gradients: Tensor, operator: Operator, strength: float, *, decomposed: Decomposed | None = None
) -> Remains:
    """One operator at a strength of the caller's, in its own units; see :func:`remains`."""
    if operator not in OPERATORS:
        raise ValueError(f"operator={operator!r}: expected one of {', '.join(map(repr, OPERATORS))}")
    if not strength > 0:
        raise ValueError(f"strength={strength}: expected a positive number")
    return _Stack(gradients, decomposed).apply(operator, strength)


class _Stack:
    """Gradients with what every operator needs of them."""

    def __init__(self, gradients: Tensor, decomposed: Decomposed | None) -> None:
        check_stack(gradients)
        self.X = wide(gradients)
        self.values, self.left = decomposed or decompose(self.X)
        self.sum = self.X.sum(0, dtype=torch.float64).to(self.X.dtype)
        self.squares = self.values.square().sum(-1)
        if not self.squares.sum() > 0:
            raise ValueError("the gradients are all zero")
        count = len(self.X)
        with_sum = self._inner(self.X, self.sum)
        self.pairs = float(self.sum.double().square().sum() - self.squares.sum())
        self.pairs_without = self.pairs - 2 * (with_sum - self.squares)
        self.variance = self._variance(self.squares, self.sum)
        stride = sample_stride(self.X.numel(), self.X.shape[-1], SAMPLE)
        self.sample = self.X.reshape(-1)[::stride].double().abs()
        self.count = count

    def strength(self, operator: Operator, energy: float) -> float:
        """The strength at which the operator leaves this share of the energy, by bisection on its logarithm."""
        leaves, whole, top = self._energy_left(operator)
        low, high = math.log(top) - 30.0, math.log(top) + 10.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if leaves(math.exp(middle)) < energy * whole else (low, middle)
        return math.exp((low + high) / 2)

    def _energy_left(self, operator: Operator) -> tuple[Callable[[float], float], float, float]:
        """Energy left at a strength, all energy, and a strength that leaves nearly all."""
        if operator in ("shrink", "clamp"):
            y = self.sample
            form: Literal["redescending", "hard"] = "redescending" if operator == "shrink" else "hard"
            return (
                lambda tau: float(smooth_shrink(y, tau, form=form).square().sum()),
                float(y.square().sum()),
                float(y.max()),
            )
        sigma = self.squares.sqrt() if operator == "norm" else self.values
        return (
            lambda c: float((sigma * _gain(operator, sigma, c)).square().sum()),
            float(sigma.square().sum()),
            float(sigma.max()),
        )

    def apply(self, operator: Operator, strength: float) -> Remains:
        """What the operator leaves at this strength."""
        total = torch.zeros_like(self.sum)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for index, gradient in enumerate(self.X):
            left, energy, with_own = self._one(operator, strength, gradient, index)
            total += left
            found.append((energy, with_own, self._inner(left, self.sum)))
        energies, own, with_sum = (torch.stack(column) for column in zip(*found, strict=True))
        # ⟨op(g_k), g_l⟩ over pairs of different batches only: their noises are independent.
        pairs = with_sum.sum() - own.sum()
        without = pairs - with_sum - self._inner(self.X, total) + 2 * own
        return Remains(
            operator=operator,
            strength=strength,
            energy=float(energies.sum() / self.squares.sum()),
            signal=jackknife(without / self.pairs_without, float(pairs) / self.pairs),
            noise=self._variance(energies, total) / self.variance,
        )

    def _one(self, operator: Operator, strength: float, gradient: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """op(g) of a batch, ‖op(g)‖² and ⟨op(g), g⟩."""
        if operator in ("shrink", "clamp"):
            left = smooth_shrink(gradient, strength, form="redescending" if operator == "shrink" else "hard")
            return left, self._inner(left, left), self._inner(left, gradient)
        if operator == "norm":
            gain = _gain(operator, self.squares[index].sqrt(), strength)
            return gradient * gain.to(gradient.dtype), gain**2 * self.squares[index], gain * self.squares[index]
        U, sigma = self.left[index], self.values[index]
        gain = _gain(operator, sigma, strength)
        left = (U * gain.to(U.dtype)) @ (U.mT @ gradient)
        return left, (gain * sigma).square().sum(), (gain * sigma.square()).sum()

    def _variance(self, squares: Tensor, total: Tensor) -> float:
        """Summed over entries, from the squared norms of all batches and their sum."""
        count = len(squares)
        return float(squares.sum() - total.double().square().sum() / count) / (count - 1)

    @staticmethod
    def _inner(one: Tensor, two: Tensor) -> Tensor:
        # Products in the stack's precision, their sum in float64: the sum is where digits would be lost.
        return (one * two).sum((-2, -1), dtype=torch.float64)


def _gain(operator: Operator, sigma: Tensor, c: float) -> Tensor:
    """By how much a singular value, or a norm, is multiplied."""
    if operator == "soft clip":
        return 1 / torch.hypot(torch.ones_like(sigma), sigma / c)
    return (c / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)).clamp_max(1.0)
