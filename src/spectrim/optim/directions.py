"""Base directions: the updates of plain optimizers, before any spectral operator.

Directions work entry by entry over lists of tensors (:mod:`spectrim.kernels`), so they run on shards as on whole
matrices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor
from typing_extensions import override

from spectrim.kernels.adam import adam_directions
from spectrim.kernels.ademamix import ademamix_directions
from spectrim.kernels.lists import Found
from spectrim.kernels.mars import corrected_gradients
from spectrim.kernels.momentum import momentum_directions

__all__ = ["MARS", "AdEMAMix", "Adam", "Average", "Direction", "Given", "Momentum", "Sign"]

#: The state of several parameters: key -> one tensor for each parameter.
State = Mapping[str, Sequence[Tensor]]


@dataclass(frozen=True)
class Direction(ABC):
    """A base direction. Its dataclass fields are its options; directions with equal options are equal.

    Attributes:
        name: its name for ``describe``.
        keys: names of its state tensors, which have the parameter's shape and start at zero.
        corrects: those of ``keys`` from which :meth:`correct` corrects gradients; none if it does not.
        flops: operations per entry, for ``spectrim plan``.
    """

    name: ClassVar[str]
    keys: ClassVar[tuple[str, ...]]
    corrects: ClassVar[tuple[str, ...]] = ()
    flops: ClassVar[int]

    @classmethod
    @abstractmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """The direction with the options of a param group."""

    @abstractmethod
    def direct(
        self, grads: Sequence[Tensor], state: State, steps: Sequence[Tensor], out: Sequence[Tensor], found: Found
    ) -> None:
        """Write every parameter's direction to ``out``, and update its state in place.

        Args:
            grads: in float32 or wider; not written to.
            state: in float32 or wider.
            steps: scalar counts of steps, including this one.
            out: uninitialised tensors of the gradients' shapes and dtype.
            found: None, or a flag that is 1 if the step is skipped; see :mod:`spectrim.kernels`.
        """

    def correct(self, grads: Sequence[Tensor], state: State, out: Sequence[Tensor], found: Found) -> None:
        """Write corrected gradients to ``out``, and update the state named in ``corrects``.

        The step then bounds the norm of every corrected matrix by 1, which on shards needs other ranks, and gives the
        result to :meth:`direct` in place of gradients. Arguments are those of :meth:`direct`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Adam(Direction):
    """m̂ / (√v̂ + ε)."""

    beta1: float
    beta2: float
    eps: float

    name: ClassVar[str] = "adam"
    keys: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    flops: ClassVar[int] = 12

    @classmethod
    @override
    def of(cls, options: Mapping[str, Any]) -> Self:
        # Groups of AdEMAMix have a third beta; groups of MARS have other betas for what it leaves to AdamW.
        beta1, beta2 = options.get("adamw_betas", options["betas"])[:2]
        return cls(beta1, beta2, options["eps"])

    @override
    def direct(
        self, grads: Sequence[Tensor], state: State, steps: Sequence[Tensor], out: Sequence[Tensor], found: Found
    ) -> None:
        moments = state["exp_avg"], state["exp_avg_sq"]
        adam_directions(grads, *moments, steps, out, beta1=self.beta1, beta2=self.beta2, eps=self.eps, found=found)


@dataclass(frozen=True)
class AdEMAMix(Direction):
    """Adam with a second, slow average: (m̂₁ + a_t m₂) / (√v̂ + ε) (arXiv 2409.03137)."""

    betas: tuple[float, float, float]
    eps: float
    alpha: float
    warmup_steps: int | None

    name: ClassVar[str] = "ademamix"
    keys: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_slow", "exp_avg_sq")
    flops: ClassVar[int] = 17

    @classmethod
    @override
    def of(cls, options: Mapping[str, Any]) -> Self:
        warmup = options["slow_warmup_steps"] or options["total_steps"]
        return cls(tuple(options["betas"]), options["eps"], options["alpha"], warmup)

    @override
    def direct(
        self, grads: Sequence[Tensor], state: State, steps: Sequence[Tensor], out: Sequence[Tensor], found: Found
    ) -> None:
        ademamix_directions(
            grads,
            state["exp_avg"],
            state["exp_avg_slow"],
            state["exp_avg_sq"],
            steps,
            out,
            betas=self.betas,
            alpha=self.alpha,
            eps=self.eps,
            warmup_steps=self.warmup_steps,
            found=found,
        )


@dataclass(frozen=True)
class MARS(Adam):
    """Adam on the corrected gradient c = G + γ β₁/(1−β₁) (G − G₋), whose norm is at most 1 (arXiv 2411.10438)."""

    gamma: float

    name: ClassVar[str] = "mars"
    keys: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "previous_grad")
    corrects: ClassVar[tuple[str, ...]] = ("previous_grad",)
    flops: ClassVar[int] = 18

    @classmethod
    @override
    def of(cls, options: Mapping[str, Any]) -> Self:
        beta1, beta2 = options["betas"]
        return cls(beta1, beta2, options["eps"], options["gamma"])

    @override
    def correct(self, grads: Sequence[Tensor], state: State, out: Sequence[Tensor], found: Found) -> None:
        share = self.gamma * self.beta1 / (1 - self.beta1)
        corrected_gradients(grads, state["previous_grad"], out, share=share, found=found)


@dataclass(frozen=True)
class Momentum(Direction):
    """Momentum as a sum: M ← μM + G; with Nesterov G + μM."""

    decay: float
    nesterov: bool

    name: ClassVar[str] = "momentum"
    keys: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    flops: ClassVar[int] = 4
    average: ClassVar[bool] = False
    sign: ClassVar[bool] = False

    @classmethod
    @override
    def of(cls, options: Mapping[str, Any]) -> Self:
        return cls(options["momentum"], options["nesterov"])

    @override
    def direct(
        self, grads: Sequence[Tensor], state: State, steps: Sequence[Tensor], out: Sequence[Tensor], found: Found
    ) -> None:
        momentum_directions(
            grads,
            state["momentum_buffer"],
            out,
            decay=self.decay,
            average=self.average,
            nesterov=self.nesterov,
            sign=self.sign,
            found=found,
        )


@dataclass(frozen=True)
class Average(Momentum):
    """Momentum as an average: M ← βM + (1 − β)G; with Nesterov G + β(M − G)."""

    name: ClassVar[str] = "average"
    flops: ClassVar[int] = 6
    average: ClassVar[bool] = True


@dataclass(frozen=True)
class Sign(Momentum):
    """The sign of momentum as a sum."""

    name: ClassVar[str] = "sign"
    flops: ClassVar[int] = 5
    sign: ClassVar[bool] = True


@dataclass(frozen=True)
class Given(Direction):
    """A direction that was computed elsewhere: a gradient, or the update of a wrapped optimizer."""

    name: ClassVar[str] = "given"
    keys: ClassVar[tuple[str, ...]] = ()
    flops: ClassVar[int] = 0

    @classmethod
    @override
    def of(cls, options: Mapping[str, Any]) -> Self:
        return cls()

    @override
    def direct(
        self, grads: Sequence[Tensor], state: State, steps: Sequence[Tensor], out: Sequence[Tensor], found: Found
    ) -> None:
        raise TypeError("a given direction cannot be computed")
