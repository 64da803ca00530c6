"""A parameter during the step of a base optimizer that :class:`.SpectralClipping` wraps.

The weight is set aside, the base steps on what its :class:`.StepDecomposition` asks for,
and what it did is taken back as a direction.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from spectrim.optim.stepping.entries import Entry
from spectrim.optim.wrapping.probe import StepDecomposition

__all__ = ["WrappedEntry"]


@dataclass(kw_only=True, eq=False)
class WrappedEntry(Entry):
    """An entry whose parameter is in the hands of a base optimizer, from construction to :meth:`restore`.

    Attributes:
        decomposition: how the base steps it.
        weight_decay: the group's; it matters where the decomposition couples it to the gradient.
        keep: what the weight is multiplied by before the change is added; known after the base has stepped.
    """

    decomposition: StepDecomposition
    weight_decay: float
    keep: float | Tensor = 1.0
    _weight: Tensor | None = field(init=False)
    _version: int = field(init=False)

    def __post_init__(self) -> None:
        self._weight = self.parameter.clone()
        if self.decomposition.way == "coupled":
            alpha = self.decomposition.coupling * self.weight_decay
            self.show(torch.add(self.grad, self._weight, alpha=alpha))
        elif self.decomposition.writes_gradients:
            self.show(self.grad.clone())
        if self.decomposition.way != "direct":
            self.parameter.zero_()
        self._version = self.parameter._version

    def show(self, grad: Tensor | None) -> None:
        """Let the base see another gradient; None for the one that was given."""
        self.parameter.grad = self.grad if grad is None else grad

    def restore(self) -> None:
        """Put the weight and the gradient back. Safe to call again: what came after stays."""
        self.show(None)
        if self._weight is not None:
            self.parameter.copy_(self._weight)
            self._weight = None

    def idled(self) -> bool:
        """Whether the base left the parameter out of this step, as some do in their first: nothing decays then."""
        if not self.decomposition.idles or self.parameter._version != self._version:
            return False
        # Reads the device, but only in those few steps.
        return self.decomposition.way == "direct" or not self.parameter.any()

    def direction(self) -> Tensor:
        """The learning rate times the base's direction, in float32 or better."""
        dtype = torch.promote_types(self.parameter.dtype, torch.float32)
        left = self.parameter.to(dtype)
        if self.decomposition.way != "direct":
            return -left
        assert self._weight is not None
        return self._weight.to(dtype) * self.keep - left
