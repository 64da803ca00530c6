"""One flat buffer for all numbers of a measurement, for the subjects of one team.

A row holds the numbers of a :class:`~spectrim.monitor.metrics.MatrixRequest` for one matrix. Each rank fills the rows
of the matrices that it owns; one sum over ranks completes the buffer on all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spectrim.distributed.collectives import Team
from spectrim.monitor.metrics import KINDS, Kind, MatrixRequest, read
from spectrim.monitor.subjects import Subject

__all__ = ["MeasurementBuffer", "PartMeasurement", "Reading", "Requests", "Slot"]

#: Two flags precede a subject's squared norms: it has a gradient, and a hook saw the gradient being accumulated.
HEAD = 2

#: The requests for all parts of a subject, by kind.
Requests = dict[Kind, list[MatrixRequest]]

#: The metrics of :func:`~spectrim.monitor.metrics.read` as lists, with one value for each matrix of a part.
Reading = dict[str, list[Any]]


@dataclass(frozen=True)
class Slot:
    """The position of one part's numbers: those of ``rows`` matrices, from index ``start``."""

    request: MatrixRequest
    start: int
    rows: int

    @property
    def size(self) -> int:
        """The number of numbers."""
        return self.rows * self.request.length

    def row(self, index: int) -> Slot:
        """The slot of one matrix of a stack."""
        return Slot(self.request, self.start + index * self.request.length, 1)


@dataclass(eq=False)
class PartMeasurement:
    """The measured numbers of one part of a parameter, on the host.

    Attributes:
        readings: the metrics, by kind.
        before: the squared norm of the gradient when it was accumulated, or None if no hook saw it.
        limit: the largest singular value that its clip allows for an update, or None without a clip.
    """

    subject: Subject
    name: str
    shape: tuple[int, ...]
    before: float | None
    limit: float | None
    readings: dict[Kind, Reading] = field(default_factory=dict)


class MeasurementBuffer:
    """A buffer for the numbers of subjects of one team.

    Args:
        team: the ranks of the subjects' mesh; None for parameters that are not sharded.
        subjects: in the same order on every rank.
        requests_of: returns the requests for a subject.
    """

    def __init__(
        self, team: Team | None, subjects: Sequence[Subject], requests_of: Callable[[Subject], Requests]
    ) -> None:
        self.team, self.subjects = team, subjects
        self._device = subjects[0].parameter.device
        self._heads: dict[Subject, int] = {}
        self._slots: dict[tuple[Subject, Kind], list[Slot]] = {}
        self._pieces: dict[int, Tensor] = {}
        place = 0
        for subject in subjects:
            self._heads[subject] = place
            place += HEAD + len(subject.names)
            for kind, requests in requests_of(subject).items():
                slots = self._slots[subject, kind] = []
                for request, shape in zip(requests, subject.shapes, strict=True):
                    slots.append(Slot(request, place, math.prod(shape[:-2])))
                    place += slots[-1].size
        self._length = place

    def slots(self, subject: Subject, kind: Kind) -> list[Slot]:
        """The slots of a subject's parts; empty if that kind was not requested."""
        return self._slots.get((subject, kind), [])

    def put(self, slot: Slot, rows: Tensor) -> None:
        """Set the numbers of a slot's rows."""
        self._pieces[slot.start] = rows

    def put_heads(self, norms: Mapping[Subject, Tensor]) -> None:
        """Set the subjects' flags, and the squared norms (parts) of those in ``norms``."""
        one = torch.ones(1, dtype=torch.float64, device=self._device)
        for subject, place in self._heads.items():
            if subject.parameter.grad is not None:
                self._pieces[place] = one
            if subject in norms:
                self._pieces[place + 1] = one
                if subject.counts:
                    self._pieces[place + HEAD] = norms[subject]

    def complete(self) -> Tensor:
        """The buffer, summed over the team, all of whose ranks call this; numbers that no rank set are zero."""
        zeros = torch.zeros(self._length, dtype=torch.float64, device=self._device)
        parts: list[Tensor] = []
        place = 0
        for start in sorted(self._pieces):
            piece = self._pieces[start]
            if start > place:
                parts.append(zeros[: start - place])
            parts.append(piece.to(self._device))
            place = start + piece.numel()
        numbers = torch.cat([*parts, zeros[place:]])
        self._pieces.clear()
        if self.team is not None:
            self.team.sum(numbers, "monitor")
        return numbers

    def read(self, numbers: Tensor, limits: Mapping[Subject, tuple[float, float]]) -> list[PartMeasurement]:
        """The measurements of the parts of every subject that had a gradient.

        Args:
            numbers: the result of :meth:`complete`, copied to the host.
            limits: limit and share of the subjects' clips, see :class:`~spectrim.monitor.step_clip.Clip`.
        """
        found: list[PartMeasurement] = []
        alike: dict[MatrixRequest, list[tuple[PartMeasurement, Slot, float]]] = {}
        for subject, place in self._heads.items():
            has_gradient, was_seen, *norms = numbers[place : place + HEAD + len(subject.names)].tolist()
            if not has_gradient > 0:
                continue
            clip, share = limits.get(subject, (None, math.nan))
            for index, (name, shape) in enumerate(zip(subject.names, subject.shapes, strict=True)):
                limit = None if clip is None else clip * math.sqrt(max(1.0, shape[-2] / shape[-1]))
                part = PartMeasurement(subject, name, shape, norms[index] if was_seen > 0 else None, limit)
                found.append(part)
                mark = math.nan if limit is None else limit * share
                for kind in KINDS:
                    for slot in self.slots(subject, kind)[index : index + 1]:
                        alike.setdefault(slot.request, []).append((part, slot, mark))
        for request, some in alike.items():
            rows = torch.cat([numbers[slot.start : slot.start + slot.size].view(slot.rows, -1) for _, slot, _ in some])
            marks = torch.tensor([mark for _, slot, mark in some for _ in range(slot.rows)], dtype=torch.float64)
            lists = {name: values.tolist() for name, values in read(request, rows, limit=marks).items()}
            start = 0
            for part, slot, _ in some:
                stop = start + slot.rows
                part.readings[request.kind] = {name: values[start:stop] for name, values in lists.items()}
                start = stop
        return found
