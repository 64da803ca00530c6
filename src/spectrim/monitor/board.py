"""Where the numbers of a measurement are: one tensor for all subjects of a team, with a place for each number.

A row of the board is what an :class:`~spectrim.monitor.measure.Order` asks for of one matrix. Ranks of shards fill the
rows of the matrices that they own, and one sum completes the board everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spectrim.distributed.collectives import Team
from spectrim.monitor.measure import KINDS, Kind, Order
from spectrim.monitor.subjects import Subject

__all__ = ["Board", "Found", "Orders", "Slot", "boards_of", "on_host"]

#: Of every subject: has it a gradient, and did a hook see it accumulated. Its parts' squared norms then follow.
HEAD = 2

#: The orders of all parts of a subject, by kind.
Orders = dict[Kind, list[Order]]


@dataclass(frozen=True)
class Slot:
    """Where the numbers of one part are: ``rows`` matrices from ``start``."""

    order: Order
    start: int
    rows: int

    @property
    def stop(self) -> int:
        """Where the next one's are."""
        return self.start + self.rows * self.order.length

    def row(self, index: int) -> Slot:
        """The slot of one matrix of a stack."""
        return Slot(self.order, self.start + index * self.order.length, 1)


@dataclass(eq=False)
class Found:
    """What was found of one part of a parameter, on the host.

    Attributes:
        orders: what was measured, by kind.
        numbers: (E, length), by kind.
        before: the squared norm of the gradient when it was accumulated, or None where no hook saw it.
        limit, mark: of its clip, see :class:`~spectrim.monitor.clip.Clip`; None without one.
    """

    subject: Subject
    name: str
    shape: tuple[int, ...]
    orders: dict[Kind, Order] = field(default_factory=dict)
    numbers: dict[Kind, Tensor] = field(default_factory=dict)
    before: float | None = None
    limit: float | None = None
    mark: float | None = None


class Board:
    """The numbers of some subjects.

    Args:
        team: whose subjects they are; None for parameters of this process.
        subjects: in the same order on every rank.
        orders_of: what is wanted of each.
    """

    def __init__(self, team: Team | None, subjects: Sequence[Subject], orders_of: Callable[[Subject], Orders]) -> None:
        self.team, self.subjects = team, list(subjects)
        self._heads: dict[Subject, int] = {}
        self._slots: dict[tuple[Subject, Kind], list[Slot]] = {}
        place = 0
        for subject in self.subjects:
            self._heads[subject] = place
            place += HEAD + len(subject.names)
            for kind, orders in orders_of(subject).items():
                slots = self._slots[subject, kind] = []
                for order, shape in zip(orders, subject.shapes, strict=True):
                    slots.append(Slot(order, place, math.prod(shape[:-2])))
                    place = slots[-1].stop
        self.numbers = torch.zeros(place, dtype=torch.float64, device=self.subjects[0].parameter.device)

    def slots(self, subject: Subject, kind: Kind) -> list[Slot]:
        """The places of a subject's parts; none where that kind is not wanted of it."""
        return self._slots.get((subject, kind), [])

    def put(self, slot: Slot, rows: Tensor) -> None:
        """Write rows of numbers to their place."""
        self.numbers[slot.start : slot.stop] = rows.reshape(-1).to(self.numbers.device)

    def put_heads(self, norms: Mapping[Subject, Tensor]) -> None:
        """Write which subjects have a gradient, and its squared norms (parts) where a hook saw it."""
        for subject, place in self._heads.items():
            norm = norms.get(subject)
            self.numbers[place] = float(subject.parameter.grad is not None)
            self.numbers[place + 1] = float(norm is not None)
            if norm is not None and subject.counts:
                self.numbers[place + HEAD : place + HEAD + len(norm)] = norm.to(self.numbers.device)

    def complete(self) -> Tensor:
        """The numbers of all ranks; each of the team calls this."""
        if self.team is not None:
            self.team.sum(self.numbers, "monitor")
        return self.numbers

    def read(self, numbers: Tensor) -> list[Found]:
        """What the numbers say, on the host: the parts of every subject that had a gradient."""
        found = []
        for subject, place in self._heads.items():
            if not numbers[place] > 0:
                continue
            for index, (name, shape) in enumerate(zip(subject.names, subject.shapes, strict=True)):
                part = Found(subject, name, shape)
                if numbers[place + 1] > 0:
                    part.before = float(numbers[place + HEAD + index])
                for kind in KINDS:
                    for slot in self.slots(subject, kind)[index : index + 1]:
                        part.orders[kind] = slot.order
                        part.numbers[kind] = numbers[slot.start : slot.stop].view(slot.rows, slot.order.length)
                found.append(part)
        return found


def boards_of(subjects: Sequence[Subject], orders_of: Callable[[Subject], Orders]) -> list[Board]:
    """A board for the subjects of every team, in order."""
    teams: dict[object, list[Subject]] = {}
    for subject in subjects:
        teams.setdefault(subject.team and subject.team.key, []).append(subject)
    return [Board(same[0].team, same, orders_of) for same in teams.values()]


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Flat tensors on the host, in one read of each device."""
    found: dict[int, Tensor] = {}
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        indices = [index for index, tensor in enumerate(tensors) if tensor.device == device]
        read = torch.cat([tensors[index].double() for index in indices]).cpu()
        found.update(zip(indices, torch.split(read, [len(tensors[index]) for index in indices]), strict=True))
    return [found[index] for index in range(len(tensors))]
