"""Measures how much of a gradient's mean (signal) and noise remains after clipping and shrinking.

Multiplying by s keeps a share s of the mean and s² of the noise's variance, which a learning rate does as well. An
operator removes noise only if the remaining noise is below the square of the remaining signal. Operators are compared
at equal remaining energy.
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
"""Spectral clipping at c, soft and hard; redescending shrinkage and clamping of entries at τ; the Frobenius norm
clipped to c."""

ENERGIES = (0.9, 0.5, 0.2, 0.05)
"""Default shares of E‖g‖_F² at which operators are compared."""

SAMPLE = 2**16
"""Number of entries from which the strength of an entry-wise operator is found."""


@dataclass(frozen=True, kw_only=True)
class Remains:
    """The signal and noise that remain after an operator.

    Attributes:
        operator: the operator.
        strength: c or τ, in the units of singular values, of entries or of the norm: smaller is stronger.
        energy: E‖op(g)‖_F²/E‖g‖_F².
        signal: ⟨E op(g), G⟩/‖G‖_F², with a standard error by jackknife over batches.
        noise: the variance of op(g) over batches, summed over entries, divided by that of g.
    """

    operator: Operator
    strength: float
    energy: float
    signal: Estimate
    noise: float

    @property
    def gain(self) -> float:
        """Signal squared over noise: 1 for plain scaling, above 1 if the operator removes noise."""
        return self.signal.value**2 / self.noise if self.noise > 0 else math.nan


def remains(
    gradients: Tensor, *, energies: Sequence[float] = ENERGIES, decomposed: Decomposed | None = None
) -> list[Remains]:
    """Apply every operator at the strengths that leave given shares of the energy.

    Args:
        gradients: (K, m, n), one matrix's gradient on each of K >= 4 independent batches.
        energies: remaining shares of E‖g‖_F², each in (0, 1).
        decomposed: the result of :func:`~spectrim.monitor.gradient_stacks.decompose` on the wide stack, if known.

    Raises:
        ValueError: the gradients are all zero, or a share is outside its range.

    Memory beside the stack: its left singular vectors, and one matrix.
    """
    for energy in energies:
        if not 0 < energy < 1:
            raise ValueError(f"energies={tuple(energies)}: expected shares between 0 and 1")
    stack = _Stack(gradients, decomposed)
    return [stack.apply(operator, stack.strength(operator, energy)) for operator in OPERATORS for energy in energies]


def remains_at(
    gradients: Tensor, operator: Operator, strength: float, *, decomposed: Decomposed | None = None
) -> Remains:
    """Apply one operator at a given strength; see :func:`remains`."""
    if operator not in OPERATORS:
        raise ValueError(f"operator={operator!r}: expected one of {', '.join(map(repr, OPERATORS))}")
    if not strength > 0:
        raise ValueError(f"strength={strength}: expected a positive number")
    return _Stack(gradients, decomposed).apply(operator, strength)


class _Stack:
    """Gradients, with quantities that all operators need."""

    def __init__(self, gradients: Tensor, decomposed: Decomposed | None) -> None:
        check_stack(gradients)
        self.X = wide(gradients)
        self.values, self.left = decomposed or decompose(self.X)
        self.sum = self.X.sum(0, dtype=torch.float64).to(self.X.dtype)
        self.squares = self.values.square().sum(-1)
        if not self.squares.sum() > 0:
            raise ValueError("the gradients are all zero")
        with_sum = self._inner(self.X, self.sum)
        self.pairs = float(self.sum.double().square().sum() - self.squares.sum())
        self.pairs_without = self.pairs - 2 * (with_sum - self.squares)
        self.variance = self._variance(self.squares, self.sum)
        stride = sample_stride(self.X.numel(), self.X.shape[-1], SAMPLE)
        self.sample = self.X.reshape(-1)[::stride].double().abs()

    def strength(self, operator: Operator, energy: float) -> float:
        """The strength at which this share of the energy remains, by bisection on its logarithm."""
        leaves, whole, top = self._energy_left(operator)
        low, high = math.log(top) - 30.0, math.log(top) + 10.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if leaves(math.exp(middle)) < energy * whole else (low, middle)
        return math.exp((low + high) / 2)

    def _energy_left(self, operator: Operator) -> tuple[Callable[[float], float], float, float]:
        """The remaining energy as a function of strength, the whole energy, and a strength that leaves nearly all."""
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
        """The signal and noise that remain at this strength."""
        total = torch.zeros_like(self.sum)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for index, gradient in enumerate(self.X):
            left, energy, with_own = self._one(operator, strength, gradient, index)
            total += left
            found.append((energy, with_own, self._inner(left, self.sum)))
        energies, own, with_sum = (torch.stack(column) for column in zip(*found, strict=True))
        # ⟨op(g_k), g_l⟩ over pairs of different batches only, whose noises are independent.
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
        """op(g) for one batch, ‖op(g)‖² and ⟨op(g), g⟩."""
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
        """The variance over batches, summed over entries, from the batches' squared norms and their sum."""
        count = len(squares)
        return float(squares.sum() - total.double().square().sum() / count) / (count - 1)

    @staticmethod
    def _inner(one: Tensor, two: Tensor) -> Tensor:
        # Only the sum needs float64, in which digits would be lost otherwise.
        return (one * two).sum((-2, -1), dtype=torch.float64)


def _gain(operator: Operator, sigma: Tensor, c: float) -> Tensor:
    """The factor on a singular value or norm."""
    if operator == "soft clip":
        return 1 / torch.hypot(torch.ones_like(sigma), sigma / c)
    return (c / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)).clamp_max(1.0)
