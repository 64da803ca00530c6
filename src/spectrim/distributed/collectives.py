"""Messages between ranks: batched sums and all-to-all exchanges within a team, and counts of the bytes sent.

An exchange follows a planned :class:`~spectrim.distributed.routes.Route`. One exchange serves many matrices, with one
message to each rank and without padding. A :class:`Team` caches its plans.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from spectrim.distributed.routes import Route

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Exchange", "Recorder", "Team", "record", "team_of"]

#: The most plans that a team keeps; a step needs a few for each of its rounds of exchanges.
MOST_PLANS = 4096

Plan = TypeVar("Plan")


@dataclass
class Recorder:
    """Bytes that this rank sent, by purpose."""

    sent: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def total(self) -> float:
        """Bytes sent for all purposes."""
        return sum(self.sent.values())


_recorders: list[Recorder] = []


@contextmanager
def record() -> Iterator[Recorder]:
    """Count the bytes that this rank sends in the context.

    A sum over P ranks counts as 2 (P−1)/P times its size, as in optimal algorithms.
    """
    recorder = Recorder()
    _recorders.append(recorder)
    try:
        yield recorder
    finally:
        _recorders.remove(recorder)


def _count(purpose: str, size: float) -> None:
    for recorder in _recorders:
        recorder.sent[purpose] += size


@dataclass(eq=False)
class Exchange:
    """An all-to-all under way; :meth:`wait` completes it."""

    route: Route
    own: Sequence[Tensor]
    work: Any
    message: Tensor
    received: Tensor

    def wait(self, targets: Sequence[Tensor]) -> None:
        """Wait, and fill the route's targets, contiguous tensors, from the received message and this rank's tensors."""
        if self.work is not None:
            self.work.wait()
        self.route.unpack(self.received, self.own, targets)


@dataclass(frozen=True, eq=False)
class Team:
    """The ranks of a mesh, numbered as in :class:`~spectrim.distributed.sharding.Sharding`.

    There is one object for each sequence of ranks, so that teams compare by identity.

    Attributes:
        group: the process group.
        order: for every member its rank in the group.
        member: this rank's number in the team.
    """

    group: dist.ProcessGroup
    order: tuple[int, ...]
    member: int
    _plans: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def planned(self, key: Hashable, make: Callable[[], Plan]) -> Plan:
        """The plan that ``make`` returns, cached by key.

        Args:
            key: everything that the plan depends on. It must not hold parameters, which the cache would keep alive.
        """
        plan: Plan | None = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= MOST_PLANS:
                self._plans.pop(next(iter(self._plans)))
            plan = self._plans[key] = make()
        return plan

    @property
    def size(self) -> int:
        """The number of members."""
        return len(self.order)

    def sum(self, numbers: Tensor, purpose: str) -> None:
        """Replace a tensor by its sum over all members, in place; all ranks get the same bits."""
        self._reduce(numbers, dist.ReduceOp.SUM, purpose)

    def maximum(self, numbers: Tensor, purpose: str) -> None:
        """Replace a tensor by its elementwise maximum over all members, in place."""
        self._reduce(numbers, dist.ReduceOp.MAX, purpose)

    def _reduce(self, numbers: Tensor, operation: Any, purpose: str) -> None:
        if self.size > 1 and numbers.numel():
            _count(purpose, 2 * numbers.nbytes * (self.size - 1) / self.size)
            dist.all_reduce(numbers, operation, group=self.group)

    def gather_objects(self, value: Any) -> list[Any]:
        """Gather one small Python object from every member. It is slow: not for use in every step."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return [found[rank] for rank in self.order]

    def exchange(
        self, route: Route, tensors: Sequence[Tensor], *, dtype: torch.dtype, device: torch.device, purpose: str
    ) -> Exchange:
        """Post an all-to-all.

        Args:
            route: planned for the shapes of the tensors.
            tensors: the tensors to send, or to keep on this rank.
            dtype: dtype of the messages and results.
            device: device of the tensors.
            purpose: the purpose under which bytes are counted.
        """
        own = [tensor.to(dtype).contiguous() for tensor in tensors]
        message = route.pack(own, dtype, device)
        received = torch.empty(sum(route.received), dtype=dtype, device=device)
        work = None
        if self.size > 1:
            _count(purpose, message.nbytes)
            work = dist.all_to_all_single(
                received, message, route.received, route.sent, group=self.group, async_op=True
            )
        return Exchange(route, own, work, message, received)


_groups: dict[tuple[int, ...], tuple[Any, dist.ProcessGroup]] = {}
_teams: weakref.WeakValueDictionary[tuple[dist.ProcessGroup, tuple[int, ...]], Team] = weakref.WeakValueDictionary()
#: Teams by the id of their mesh, since comparing meshes takes time proportional to their ranks.
_known: dict[int, tuple[weakref.ref[DeviceMesh], Any, Team]] = {}


def team_of(mesh: DeviceMesh) -> Team:
    """The team of all ranks of a mesh with any number of dimensions. All of them call this in the same order."""
    found = _known.get(id(mesh))
    if found is not None and found[0]() is mesh and found[1] is dist.group.WORLD:
        return found[2]
    ranks = tuple(mesh.mesh.flatten().tolist())
    group = _group(mesh, ranks)
    team = _teams.get((group, ranks))
    if team is None:
        order = tuple(dist.get_group_rank(group, rank) for rank in ranks)
        team = _teams[group, ranks] = Team(group=group, order=order, member=ranks.index(dist.get_rank()))
    number = id(mesh)
    _known[number] = (weakref.ref(mesh, lambda _: _known.pop(number, None)), dist.group.WORLD, team)
    return team


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
