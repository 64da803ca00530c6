"""Whole matrices at owners: shards travel there in one all-to-all, are worked on once, and travel back in one.

The unit of work is one tensor, or one matrix of a stack. Its owner is any rank of the mesh, chosen so that all have
about the same work. Where there are replicas, the shards of one of them are sent and the result goes to all, so
replicas share the work and hold the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from spectrim.distributed.collectives import Team, Trade
from spectrim.distributed.runs import Runs, count, put, take, within
from spectrim.distributed.sharding import Sharding

__all__ = ["Journey", "Unit", "owners", "rounds", "units"]

#: How many bytes of matrices, in float32, each owner holds at once; one matrix always may.
ROUND_BYTES = 64 * 2**20

T = TypeVar("T")

#: Works on whole units of one shape: which tensors they belong to, and the units; a result for each.
Work = Callable[[list[int], list[Tensor]], Sequence[Tensor]]


def rounds(items: Sequence[T], shape: Callable[[T], Sequence[int]], members: int) -> Iterator[list[T]]:
    """Items in order, as many together as fill every owner's room; ``shape`` tells that of the whole of an item."""
    some: list[T] = []
    room = ROUND_BYTES * members
    for item in items:
        size = 4 * math.prod(shape(item))
        if some and size > room:
            yield some
            some, room = [], ROUND_BYTES * members
        some.append(item)
        room -= size
    if some:
        yield some


@dataclass(frozen=True)
class Unit:
    """What goes to one owner: a tensor, or matrix ``index`` of a stack.

    Attributes:
        tensor: which of the tensors sent.
        index: which matrix of a stack, or None for a whole tensor.
        shape: of the unit.
        holders: for every member its region of the unit; None where it holds nothing of it.
        replica: for every member, the replica that it belongs to.
    """

    tensor: int
    index: int | None
    shape: tuple[int, ...]
    holders: tuple[tuple[Runs, ...] | None, ...]
    replica: tuple[int, ...]

    def local_shape(self, member: int) -> tuple[int, ...]:
        """The shape of what a member holds."""
        region = self.holders[member]
        assert region is not None
        return tuple(count(runs) for runs in region)


@cache
def _units(sharding: Sharding) -> tuple[tuple[tuple[Runs, ...] | None, ...], ...]:
    """For every matrix of a stack, who holds which part of it."""
    return tuple(
        tuple(region[1:] if within(region[0], index, index + 1) else None for region in sharding.regions)
        for index in range(sharding.shape[0])
    )


def units(shardings: Sequence[Sharding], stacked: Sequence[bool]) -> list[Unit]:
    """The units of several tensors, in order. A stack (E, m, n) is E units."""
    found = []
    for tensor, (sharding, stack) in enumerate(zip(shardings, stacked, strict=True)):
        if 0 in sharding.shape:
            continue
        if not stack:
            found.append(Unit(tensor, None, sharding.shape, sharding.regions, sharding.replica))
            continue
        for index, holders in enumerate(_units(sharding)):
            found.append(Unit(tensor, index, sharding.shape[1:], holders, sharding.replica))
    return found


def owners(found: Sequence[Unit], loads: list[int]) -> list[int]:
    """For every unit its owner: the largest first, each to the member with the least work so far.

    Args:
        found: the units.
        loads: the work of every member so far in this step, to which theirs is added.
    """
    chosen = [0] * len(found)
    for index in sorted(range(len(found)), key=lambda i: -_work(found[i].shape)):
        member = min(range(len(loads)), key=loads.__getitem__)
        chosen[index] = member
        loads[member] += _work(found[index].shape)
    return chosen


def _work(shape: Sequence[int]) -> int:
    rows = shape[0]
    columns = 1
    for size in shape[1:]:
        columns *= size
    return max(1, rows * columns * min(rows, columns))


@dataclass
class Journey:
    """Local shards to owners and back. :meth:`set_out`, then :meth:`work`, then :meth:`arrive`; each posts what the
    next waits for, so that another journey's work fits in between.

    Attributes:
        team: the ranks of the mesh.
        found: all units, the same on every rank.
        dtype: in which matrices travel.
        loads: the work of every member so far in this step; this journey's is added.
    """

    team: Team
    found: Sequence[Unit]
    dtype: torch.dtype
    loads: list[int]
    _owners: list[int] = field(init=False)
    _locals: list[Tensor] = field(init=False)
    #: For a matrix of a stack, its place among those that are here.
    _places: dict[tuple[int, int], int] = field(init=False)
    _trade: Trade = field(init=False)

    def __post_init__(self) -> None:
        self._owners = owners(self.found, self.loads)
        self._places = {}
        here: dict[int, int] = {}
        for unit in self.found:
            if unit.index is not None and unit.holders[self.team.member] is not None:
                self._places[unit.tensor, unit.index] = here[unit.tensor] = here.get(unit.tensor, -1) + 1

    def set_out(self, tensors: Sequence[Tensor]) -> None:
        """Send this rank's shards, one local tensor for each, to the owners."""
        self._locals = list(tensors)
        outgoing: list[list[Tensor]] = [[] for _ in range(self.team.size)]
        incoming: list[list[tuple[int, ...]]] = [[] for _ in range(self.team.size)]
        for unit, owner in zip(self.found, self._owners, strict=True):
            for member in self._senders(unit, owner):
                if member == self.team.member:
                    outgoing[owner].append(self._part(tensors, unit))
                if owner == self.team.member:
                    incoming[member].append(unit.local_shape(member))
        self._trade = self._post(outgoing, incoming)

    def work(self, function: Work) -> None:
        """Put the units owned here together, work on them, and send every holder its part of the result.

        Args:
            function: see :data:`Work`. It may write to the units.
        """
        wholes = self.wholes()
        mine: dict[tuple[int, ...], list[int]] = {}
        for number in wholes:
            mine.setdefault(self.found[number].shape, []).append(number)
        for same in mine.values():
            done = function([self.found[n].tensor for n in same], [wholes[n] for n in same])
            wholes.update(zip(same, done, strict=True))
        outgoing: list[list[Tensor]] = [[] for _ in range(self.team.size)]
        incoming: list[list[tuple[int, ...]]] = [[] for _ in range(self.team.size)]
        for number, (unit, owner) in enumerate(zip(self.found, self._owners, strict=True)):
            if owner == self.team.member:
                for member, region in enumerate(unit.holders):
                    if region is not None:
                        outgoing[member].append(take(wholes[number], region))
            if unit.holders[self.team.member] is not None:
                incoming[owner].append(unit.local_shape(self.team.member))
        self._trade = self._post(outgoing, incoming)

    def wholes(self) -> dict[int, Tensor]:
        """The units owned here, put together, by their number; a journey may end with them."""
        arrived = [iter(found) for found in self._trade.wait()]
        found: dict[int, Tensor] = {}
        for number, (unit, owner) in enumerate(zip(self.found, self._owners, strict=True)):
            if owner != self.team.member:
                continue
            found[number] = self._locals[0].new_empty(unit.shape)
            for member in self._senders(unit, owner):
                region = unit.holders[member]
                assert region is not None
                put(found[number], region, next(arrived[member]))
        return found

    def arrive(self) -> list[Tensor]:
        """The results for this rank's shards: new tensors of the shape and dtype of those that set out."""
        arrived = [iter(found) for found in self._trade.wait()]
        results = [torch.empty_like(tensor) for tensor in self._locals]
        for unit, owner in zip(self.found, self._owners, strict=True):
            if unit.holders[self.team.member] is not None:
                self._part(results, unit).copy_(next(arrived[owner]))
        return results

    def _senders(self, unit: Unit, owner: int) -> list[int]:
        replica = unit.replica[owner]
        return [m for m, region in enumerate(unit.holders) if region is not None and unit.replica[m] == replica]

    def _part(self, tensors: Sequence[Tensor], unit: Unit) -> Tensor:
        local = tensors[unit.tensor]
        if unit.index is None:
            return local
        return local[self._places[unit.tensor, unit.index]]

    def _post(self, outgoing: list[list[Tensor]], incoming: list[list[tuple[int, ...]]]) -> Trade:
        device = self._locals[0].device
        return self.team.trade(outgoing, incoming, dtype=self.dtype, device=device, purpose="matrices")
