"""This rank's shard of a parameter during the step of a wrapped base, which steps on the DTensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spectrim.distributed.dtensor import is_dtensor
from spectrim.optim.sharded.entry import ShardedEntry, by_team, laid_like
from spectrim.optim.wrapping.probe import StepDecomposition
from spectrim.optim.wrapping.wrapped_entry import WrappedEntry, values_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["WrappedShard", "idle", "wrapped_shard"]


@dataclass(kw_only=True, eq=False)
class WrappedShard(WrappedEntry, ShardedEntry):
    """A :class:`.WrappedEntry` of local tensors.

    Attributes:
        whole: the DTensor that the base steps. It gets a gradient on every rank, zeros if this rank has none, so that
            a base that exchanges messages does so on all ranks.
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


def wrapped_shard(
    entry: ShardedEntry, whole: DTensor, decomposition: StepDecomposition, weight_decay: float
) -> WrappedShard:
    """Convert a screened entry to one that the base steps."""
    return WrappedShard(**values_of(entry), whole=whole, decomposition=decomposition, weight_decay=weight_decay)


def idle(entries: Sequence[WrappedEntry]) -> set[WrappedEntry]:
    """The entries that the base did not step; for shards, all ranks get the same answer."""
    found = {entry for entry in entries if not isinstance(entry, WrappedShard) and entry.idled()}
    shards = [entry for entry in entries if isinstance(entry, WrappedShard) and entry.decomposition.idles]
    for team, some in by_team(shards):
        moved = torch.tensor([not entry.idled() for entry in some], dtype=torch.float32, device=some[0].grad.device)
        team.maximum(moved, "agreement")
        found.update(entry for entry, number in zip(some, moved.tolist(), strict=True) if number == 0)
    return found
