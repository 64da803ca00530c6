"""The only module that sends anything: teams of ranks, their batched sums and their trades, and the count of bytes.

A trade is one all-to-all: every member has a list of tensors for every other one. Gathers, scattered sums and the way
to owners and back are all trades, so whatever one step needs for many matrices goes in one message to each rank, exact
to the byte, without padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Recorder", "Team", "Trade", "record", "team_of"]


@dataclass
class Recorder:
    """Bytes that this rank sent, by what for."""

    sent: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Bytes sent for all purposes."""
        return sum(self.sent.values())

    def add(self, purpose: str, size: float) -> None:
        """Count a message."""
        self.sent[purpose] = self.sent.get(purpose, 0.0) + size


_recorders: list[Recorder] = []


@contextmanager
def record() -> Iterator[Recorder]:
    """Count what this rank sends while the context is open.

    A sum over P ranks counts as 2 (P−1)/P times its size, what the best algorithms send of it.
    """
    recorder = Recorder()
    _recorders.append(recorder)
    try:
        yield recorder
    finally:
        _recorders.remove(recorder)


def _count(purpose: str, size: float) -> None:
    for recorder in _recorders:
        recorder.add(purpose, size)


@dataclass(eq=False)
class Trade:
    """An all-to-all under way; :meth:`wait` gives what came from every member."""

    work: Any
    sent: Tensor
    received: Tensor
    own: Sequence[Tensor]
    shapes: Sequence[Sequence[torch.Size]]
    by_rank: Sequence[int]
    member: int

    def wait(self) -> list[list[Tensor]]:
        """For every member, the tensors that it sent here, in its order. Those of this rank are the very ones given."""
        if self.work is not None:
            self.work.wait()
        found: list[list[Tensor]] = [[] for _ in self.by_rank]
        offset = 0
        for member in self.by_rank:
            for shape in self.shapes[member]:
                found[member].append(self.received[offset : offset + shape.numel()].view(shape))
                offset += shape.numel()
        found[self.member] = list(self.own)
        return found


@dataclass(frozen=True, eq=False)
class Team:
    """The ranks of a mesh, numbered as in :class:`~spectrim.distributed.sharding.Sharding`.

    Attributes:
        group: their process group.
        order: for every member its rank in the group.
        member: this process's number.
    """

    group: dist.ProcessGroup
    order: tuple[int, ...]
    member: int

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for teams of the same ranks in the same order."""
        return (self.group, *self.order)

    @property
    def size(self) -> int:
        """How many members there are."""
        return len(self.order)

    def sum(self, numbers: Tensor, purpose: str) -> None:
        """Replace a tensor by its sum over all members, in place and to the same bits everywhere."""
        self._reduce(numbers, dist.ReduceOp.SUM, purpose)

    def maximum(self, numbers: Tensor, purpose: str) -> None:
        """Replace a tensor by its largest values over all members, in place."""
        self._reduce(numbers, dist.ReduceOp.MAX, purpose)

    def _reduce(self, numbers: Tensor, operation: Any, purpose: str) -> None:
        if self.size > 1 and numbers.numel():
            _count(purpose, 2 * numbers.nbytes * (self.size - 1) / self.size)
            dist.all_reduce(numbers, operation, group=self.group)

    def gather_objects(self, value: Any) -> list[Any]:
        """One small Python object of every member. For messages, not for the path of a step."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return [found[rank] for rank in self.order]

    def trade(
        self,
        outgoing: Sequence[Sequence[Tensor]],
        incoming: Sequence[Sequence[Sequence[int]]],
        *,
        dtype: torch.dtype,
        device: torch.device,
        purpose: str,
    ) -> Trade:
        """Post an all-to-all.

        Args:
            outgoing: for every member, the tensors for it. Those for this rank itself are handed on as they are.
            incoming: for every member, the shapes of the tensors that it sends here.
            dtype: in which they travel, and arrive.
            device: where they are.
            purpose: under which the bytes are counted.
        """
        shapes = [[torch.Size(shape) for shape in found] for found in incoming]
        own = [tensor.to(dtype) for tensor in outgoing[self.member]]
        shapes[self.member] = []
        by_rank = sorted(range(self.size), key=lambda member: self.order[member])
        parcels = [
            tensor.to(dtype).reshape(-1) for member in by_rank if member != self.member for tensor in outgoing[member]
        ]
        sizes_out = [0 if m == self.member else sum(t.numel() for t in outgoing[m]) for m in by_rank]
        sizes_in = [sum(shape.numel() for shape in shapes[m]) for m in by_rank]
        received = torch.empty(sum(sizes_in), dtype=dtype, device=device)
        packed = torch.cat(parcels) if parcels else torch.empty(0, dtype=dtype, device=device)
        work = None
        if self.size > 1:
            _count(purpose, packed.nbytes)
            work = dist.all_to_all_single(received, packed, sizes_in, sizes_out, group=self.group, async_op=True)
        return Trade(work, packed, received, own, shapes, by_rank, self.member)


_groups: dict[tuple[int, ...], tuple[Any, dist.ProcessGroup]] = {}


def team_of(mesh: DeviceMesh) -> Team:
    """The team of all ranks of a mesh, of any number of dimensions. To be called by all of them in the same order."""
    ranks = tuple(mesh.mesh.flatten().tolist())
    group = _group(mesh, ranks)
    order = tuple(dist.get_group_rank(group, rank) for rank in ranks)
    return Team(group=group, order=order, member=ranks.index(dist.get_rank()))


def _group(mesh: DeviceMesh, ranks: tuple[int, ...]) -> dist.ProcessGroup:
    if mesh.ndim == 1:
        return mesh.get_group()
    world = dist.group.WORLD
    assert world is not None
    if len(ranks) == dist.get_world_size():
        return world
    found = _groups.get(ranks)
    if found is None or found[0] is not world:
        group = dist.new_group(sorted(ranks), use_local_synchronization=True)
        _groups[ranks] = found = (world, group)
    return found[1]
