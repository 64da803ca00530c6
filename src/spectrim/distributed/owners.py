"""Gathers whole matrices at owner ranks with one all-to-all, and returns the results to the shards with another.

The unit of work is a tensor, or one matrix of a stack. Owners are chosen so that all ranks have about the same work.
If there are replicas, one of them sends its shards and all get the result, so that replicas divide the work and hold
the same bits.

The plan of an exchange (:class:`OwnerPlan`) depends on shapes, layouts and the work assigned so far in a step, which
are the same in every step, so it is cached.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from spectrim.distributed.collectives import Exchange, Team
from spectrim.distributed.copies import Copy, copies_of_region
from spectrim.distributed.intervals import Intervals, count, position, within
from spectrim.distributed.routes import Route, RoutePlanner
from spectrim.distributed.sharding import Sharding
from spectrim.kernels.lists import grouped

__all__ = ["Loads", "OwnerExchange", "OwnerPlan", "Unit", "exchange_rounds", "owners", "plan_owners"]

#: The most bytes of matrices, in float32, that an owner holds at once; a single matrix may exceed it.
ROUND_BYTES = 64 * 2**20

T = TypeVar("T")

#: Works on whole units of one shape. Arguments: the indices of their tensors, and the units. Returns a result for each.
Work = Callable[[list[int], list[Tensor]], Sequence[Tensor]]

#: For every team, the work assigned to its first members so far in one step; other members have none. It makes the work
#: of the whole step even.
Loads = dict[Team, tuple[int, ...]]


def exchange_rounds(items: Sequence[T], shape: Callable[[T], Sequence[int]], members: int) -> Iterator[list[T]]:
    """Divide items, in order, into lists that fit :data:`ROUND_BYTES` per owner; ``shape`` returns an item's shape."""
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
    """The unit of work of an owner: a tensor, or one matrix of a stack.

    Attributes:
        tensor: index of the tensor.
        index: index of the matrix in its stack, or None for a whole tensor.
        shape: shape of the unit.
    """

    tensor: int
    index: int | None
    shape: tuple[int, ...]


def owners(works: Sequence[int], before: tuple[int, ...], members: int) -> tuple[list[int], tuple[int, ...]]:
    """Assign every unit, the largest first, to the member with the least work so far.

    The time does not depend on the number of members: those without work are taken in order, the others from a heap.

    Args:
        works: the work of each unit, at least 1.
        before: the work so far of the first members; the others have none.
        members: the number of members.

    Returns:
        The owner of every unit, and the new work of the first members.
    """
    chosen = [0] * len(works)
    loads = list(before)
    heap = [(load, member) for member, load in enumerate(loads)]
    heapq.heapify(heap)
    for index in sorted(range(len(works)), key=lambda i: -works[i]):
        if len(loads) < members:
            member = len(loads)
            loads.append(works[index])
            heapq.heappush(heap, (loads[member], member))
        else:
            member = heap[0][1]
            loads[member] += works[index]
            heapq.heapreplace(heap, (loads[member], member))
        chosen[index] = member
    return chosen, tuple(loads)


@dataclass(frozen=True, eq=False)
class OwnerPlan:
    """One rank's part in an exchange with owners.

    Attributes:
        units: all units, the same on every rank.
        owned: the indices of the units that this rank owns.
        there: the route from local tensors to owned units.
        back: the route from owned units to local tensors.
        loads: the work of members after this exchange; see :data:`Loads`.
    """

    units: tuple[Unit, ...]
    owned: tuple[int, ...]
    there: Route
    back: Route
    loads: tuple[int, ...]


def plan_owners(
    tensors: Sequence[tuple[Sharding, bool]], before: tuple[int, ...], order: Sequence[int], me: int
) -> OwnerPlan:
    """Plan an exchange.

    Args:
        tensors: the sharding of each tensor, and True if it is a stack (E, m, n), which has E units.
        before: see :func:`owners`.
        order: for every member its rank in the process group.
        me: this rank's number in the team.
    """
    units = tuple(_units(tensors))
    chosen, loads = owners([_work(unit.shape) for unit in units], before, len(order))
    there, back = RoutePlanner(order), RoutePlanner(order)
    owned: list[int] = []
    for number, (unit, owner) in enumerate(zip(units, chosen, strict=True)):
        sharding = tensors[unit.tensor][0]
        mine, replica = _local_copies(sharding, unit, me), sharding.replica(owner)
        if owner != me:
            if mine is not None:
                if sharding.replica(me) == replica:
                    there.send(owner, unit.tensor, mine)
                back.receive(owner, unit.tensor, [copy.reversed() for copy in mine])
            continue
        place = len(owned)
        owned.append(number)
        for member in range(sharding.members):
            region = _region(sharding, unit, member)
            if region is None or not all(region):
                continue
            copies = copies_of_region(unit.shape, region)
            if member == me:
                begin = mine[0].source if mine else 0
                local = [copy.moved(target=begin) for copy in copies]
                there.keep(unit.tensor, place, [copy.reversed() for copy in local])
                back.keep(place, unit.tensor, local)
                continue
            if sharding.replica(member) == replica:
                there.receive(member, place, [copy.reversed() for copy in copies])
            back.send(member, place, copies)
    return OwnerPlan(units, tuple(owned), there.route(), back.route(), loads)


def _units(tensors: Sequence[tuple[Sharding, bool]]) -> Iterator[Unit]:
    for tensor, (sharding, is_stack) in enumerate(tensors):
        if 0 in sharding.shape:
            continue
        if is_stack:
            yield from (Unit(tensor, index, sharding.shape[1:]) for index in range(sharding.shape[0]))
        else:
            yield Unit(tensor, None, sharding.shape)


def _region(sharding: Sharding, unit: Unit, member: int) -> tuple[Intervals, ...] | None:
    """The indices of a unit that a member holds, or None if it holds none of the matrix."""
    region = sharding.region(member)
    if unit.index is None:
        return region
    return region[1:] if within(region[0], unit.index, unit.index + 1) else None


def _local_copies(sharding: Sharding, unit: Unit, me: int) -> list[Copy] | None:
    """The copy of this rank's part of a unit from its contiguous local tensor to a parcel; None if it has no part."""
    region = _region(sharding, unit, me)
    size = 0 if region is None else math.prod(count(runs) for runs in region)
    if size == 0:
        return None
    # Matrices of a stack are consecutive in memory.
    place = 0 if unit.index is None else position(sharding.region(me)[0], unit.index)
    return [Copy((size,), (1,), (1,), place * size, 0)]


def _work(shape: Sequence[int]) -> int:
    rows, columns = shape[0], math.prod(shape[1:])
    return max(1, rows * columns * min(rows, columns))


class OwnerExchange:
    """Sends local shards to owners and back: call :meth:`send`, :meth:`work` and :meth:`results`.

    Each posts a message for which the next waits, so that other exchanges can run in between.

    Args:
        team: the ranks of the mesh.
        shardings: the shardings of the tensors to send.
        stacks: for each tensor, True if its first dimension counts matrices.
        dtype: dtype of the messages.
        loads: the work assigned so far in this step, to which this exchange adds.
    """

    def __init__(
        self, team: Team, shardings: Sequence[Sharding], stacks: Sequence[bool], dtype: torch.dtype, loads: Loads
    ) -> None:
        self._team, self._dtype = team, dtype
        tensors = tuple(zip(shardings, stacks, strict=True))
        before = loads.get(team, ())
        self._plan = team.planned(
            ("owners", tensors, before), lambda: plan_owners(tensors, before, team.order, team.member)
        )
        loads[team] = self._plan.loads

    @property
    def units(self) -> Sequence[Unit]:
        """The units of this exchange, the same on every rank."""
        return self._plan.units

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Send this rank's shards, one local tensor for each, to the owners."""
        self._locals = list(tensors)
        self._under_way = self._post(self._plan.there, tensors)

    def work(self, function: Work) -> None:
        """Apply a function to the whole units that this rank owns, and send the results back.

        Args:
            function: see :data:`Work`. It may write to the units.
        """
        wholes = self.wholes()
        for same in grouped(wholes, lambda number: self.units[number].shape).values():
            done = function([self.units[n].tensor for n in same], [wholes[n] for n in same])
            wholes.update(zip(same, done, strict=True))
        self._under_way = self._post(self._plan.back, list(wholes.values()))

    def wholes(self) -> dict[int, Tensor]:
        """The whole units that this rank owns, by index. Instead of :meth:`work`, if no results go back."""
        found = {number: self._locals[0].new_empty(self.units[number].shape) for number in self._plan.owned}
        self._under_way.wait(list(found.values()))
        return found

    def results(self) -> list[Tensor]:
        """The results for this rank's shards, as new tensors with the shapes and dtype of those that were sent."""
        found = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in self._locals]
        self._under_way.wait(found)
        return found

    def _post(self, route: Route, tensors: Sequence[Tensor]) -> Exchange:
        device = self._locals[0].device
        return self._team.exchange(route, tensors, dtype=self._dtype, device=device, purpose="matrices")
