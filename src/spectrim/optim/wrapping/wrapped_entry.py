"""A parameter during the step of a wrapped base optimizer.

The weight is saved, the base steps on zeros or on the weight as its :class:`.StepDecomposition` demands, and its change
is returned as a direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spectrim.distributed.dtensor import is_dtensor
from spectrim.optim.sharded.entry import ShardedEntry, by_team, laid_like
from spectrim.optim.stepping.entries import Entry
from spectrim.optim.wrapping.probe import StepDecomposition

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["WrappedEntry", "WrappedShard", "idle", "wrapped"]


@dataclass(kw_only=True, eq=False)
class WrappedEntry(Entry):
    """An entry whose weight is saved while the base optimizer steps, from construction to :meth:`restore`.

    Attributes:
        decomposition: how the base steps the parameter.
        weight_decay: the group's, for decay that goes into the gradient.
        keep: the factor on the weight before the change is added; set after the base's step.
    """

    decomposition: StepDecomposition
    weight_decay: float
    keep: float | Tensor = 1.0
    _weight: Tensor | None = field(init=False)
    _version: int = field(init=False)

    def __post_init__(self) -> None:
        self._weight = self.parameter.clone()
        if self.decomposition.coupling:
            alpha = self.decomposition.coupling * self.weight_decay
            self.show(torch.add(self.grad, self._weight, alpha=alpha))
        elif self.decomposition.writes_gradients:
            self.show(self.grad.clone())
        if self.decomposition.zeroed:
            self.parameter.zero_()
        self._version = self.parameter._version

    def show(self, grad: Tensor | None) -> None:
        """Set the gradient that the base sees; None restores the original."""
        self.parameter.grad = self.grad if grad is None else grad

    def restore(self) -> None:
        """Restore the weight and the gradient. Further calls do not change the weight."""
        self.show(None)
        if self._weight is not None:
            self.parameter.copy_(self._weight)
            self._weight = None

    def idled(self) -> bool:
        """True if the base did not step the parameter, as some do not in their first step: it must not decay then."""
        if not self.decomposition.idles or self.parameter._version != self._version:
            return False
        # Reads the device, but only if the base did not write to the parameter.
        return not self.decomposition.zeroed or not self.parameter.any()

    def direction(self) -> Tensor:
        """The base's change, negated: learning rate times direction, in float32 or wider."""
        dtype = torch.promote_types(self.parameter.dtype, torch.float32)
        left = self.parameter.to(dtype)
        if self.decomposition.zeroed:
            return -left
        assert self._weight is not None
        return self._weight.to(dtype) * self.keep - left


@dataclass(kw_only=True, eq=False)
class WrappedShard(WrappedEntry, ShardedEntry):
    """A :class:`WrappedEntry` of this rank's shard; the base steps on the DTensor.

    Attributes:
        whole: the DTensor. It gets a gradient on every rank, zeros if this rank has none, so that a base that exchanges
            messages does so on all ranks.
    """

    whole: DTensor
    _given: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        self._given = self.whole.grad
        if not is_dtensor(self._given) or self._given.placements != self.whole.placements:
            self.show(self.grad)
        super().__post_init__()

    def show(self, grad: Tensor | None) -> None:
        """Set the gradient that the base sees from this rank's shard; None restores the original."""
        self.whole.grad = self._given if grad is None else laid_like(self.whole, grad)


def wrapped(entry: Entry, parameter: Tensor, decomposition: StepDecomposition, weight_decay: float) -> WrappedEntry:
    """Save the weight of a screened entry, and prepare its parameter in the base's groups for the base's step."""
    values: dict[str, Any] = {each.name: getattr(entry, each.name) for each in fields(entry)}
    values |= {"decomposition": decomposition, "weight_decay": weight_decay}
    return WrappedShard(**values, whole=parameter) if is_dtensor(parameter) else WrappedEntry(**values)


def idle(entries: Sequence[WrappedEntry]) -> set[WrappedEntry]:
    """The entries that the base did not step; for shards, all ranks get the same answer."""
    found = {entry for entry in entries if not isinstance(entry, WrappedShard) and entry.idled()}
    shards = [entry for entry in entries if isinstance(entry, WrappedShard) and entry.decomposition.idles]
    for team, some in by_team(shards):
        moved = torch.tensor([not entry.idled() for entry in some], dtype=torch.float32, device=some[0].grad.device)
        team.maximum(moved, "agreement")
        found.update(entry for entry, number in zip(some, moved.tolist(), strict=True) if number == 0)
    return found
