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
from spectrim.monitor.measure import KINDS, Kind, Order, read
from spectrim.monitor.subjects import Subject

__all__ = ["Board", "Found", "Lists", "Orders", "Slot", "boards_of"]

#: Of every subject: has it a gradient, and did a hook see it accumulated. Its parts' squared norms then follow.
HEAD = 2

#: The orders of all parts of a subject, by kind.
Orders = dict[Kind, list[Order]]

#: A :data:`~spectrim.monitor.measure.Reading` as plain lists, one value for each matrix of a part.
Lists = dict[str, list[float]]


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
        readings: what was measured, by kind.
        spectra: all singular values, descending, of each matrix, by kind; of what was measured exactly.
        before: the squared norm of the gradient when it was accumulated, or None where no hook saw it.
        limit, mark: of its clip, see :class:`~spectrim.monitor.clip.Clip`; None without one.
    """

    subject: Subject
    name: str
    shape: tuple[int, ...]
    readings: dict[Kind, Lists] = field(default_factory=dict)
    spectra: dict[Kind, list[list[float]]] = field(default_factory=dict)
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
        self._device = self.subjects[0].parameter.device
        self._heads: dict[Subject, int] = {}
        self._slots: dict[tuple[Subject, Kind], list[Slot]] = {}
        self._pieces: dict[int, Tensor] = {}
        place = 0
        for subject in self.subjects:
            self._heads[subject] = place
            place += HEAD + len(subject.names)
            for kind, orders in orders_of(subject).items():
                slots = self._slots[subject, kind] = []
                for order, shape in zip(orders, subject.shapes, strict=True):
                    slots.append(Slot(order, place, math.prod(shape[:-2])))
                    place = slots[-1].stop
        self._length = place

    def slots(self, subject: Subject, kind: Kind) -> list[Slot]:
        """The places of a subject's parts; none where that kind is not wanted of it."""
        return self._slots.get((subject, kind), [])

    def put(self, slot: Slot, rows: Tensor) -> None:
        """Have rows of numbers at their place."""
        self._pieces[slot.start] = rows.reshape(-1)

    def put_heads(self, norms: Mapping[Subject, Tensor]) -> None:
        """Have it at its place which subjects have a gradient, and its squared norms (parts) where a hook saw it."""
        one = torch.ones(1, dtype=torch.float64, device=self._device)
        for subject, place in self._heads.items():
            norm = norms.get(subject)
            if subject.parameter.grad is not None:
                self._pieces[place] = one
            if norm is not None:
                self._pieces[place + 1] = one
                if subject.counts:
                    self._pieces[place + HEAD] = norm

    def complete(self) -> Tensor:
        """The numbers of all ranks, zero where none has put any; each of the team calls this."""
        starts = sorted(self._pieces)
        ends = [start + len(self._pieces[start]) for start in starts]
        gaps = [after - end for end, after in zip([0, *ends], [*starts, self._length], strict=True)]
        zeros = torch.zeros(max(gaps), dtype=torch.float64, device=self._device)
        parts = [zeros[: gaps[0]]]
        for start, gap in zip(starts, gaps[1:], strict=True):
            parts += [self._pieces[start].to(self._device), zeros[:gap]]
        numbers = torch.cat([part for part in parts if len(part)]) if self._length else zeros
        self._pieces.clear()
        if self.team is not None:
            self.team.sum(numbers, "monitor")
        return numbers

    def read(self, numbers: Tensor, marks: Mapping[Subject, Sequence[float]]) -> list[Found]:
        """What the numbers say, on the host: the parts of every subject that had a gradient.

        Args:
            numbers: :meth:`complete`, on the host.
            marks: that the parts' directions are held against, where they are clipped.
        """
        found: list[Found] = []
        asked: dict[Order, list[tuple[Found, Slot]]] = {}
        heads = {
            subject: numbers[place : place + HEAD + len(subject.names)].tolist()
            for subject, place in self._heads.items()
        }
        for subject, (has_gradient, was_seen, *norms) in heads.items():
            if not has_gradient > 0:
                continue
            for index, (name, shape) in enumerate(zip(subject.names, subject.shapes, strict=True)):
                part = Found(subject, name, shape)
                part.before = norms[index] if was_seen > 0 else None
                part.mark = marks[subject][index] if subject in marks else None
                for kind in KINDS:
                    for slot in self.slots(subject, kind)[index : index + 1]:
                        asked.setdefault(slot.order, []).append((part, slot))
                found.append(part)
        for order, parts in asked.items():
            _read_together(order, parts, numbers)
        return found


def _read_together(order: Order, parts: Sequence[tuple[Found, Slot]], numbers: Tensor) -> None:
    """Read the rows of all parts of one order at once."""
    rows = torch.cat([numbers[slot.start : slot.stop].view(slot.rows, order.length) for _, slot in parts])
    marks = [math.nan if part.mark is None else part.mark for part, slot in parts for _ in range(slot.rows)]
    reading = read(order, rows, limit=torch.tensor(marks, dtype=torch.float64))
    spectra = reading.pop("singular_values", None)
    lists = {name: values.tolist() for name, values in reading.items()}
    start = 0
    for part, slot in parts:
        stop = start + slot.rows
        part.readings[order.kind] = {name: values[start:stop] for name, values in lists.items()}
        if spectra is not None:
            part.spectra[order.kind] = spectra[start:stop].tolist()
        start = stop


def boards_of(subjects: Sequence[Subject], orders_of: Callable[[Subject], Orders]) -> list[Board]:
    """A board for the subjects of every team, in order."""
    teams: dict[object, list[Subject]] = {}
    for subject in subjects:
        teams.setdefault(subject.team and subject.team.key, []).append(subject)
    return [Board(same[0].team, same, orders_of) for same in teams.values()]
