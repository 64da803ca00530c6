"""One flat buffer for all numbers of a measurement, for the subjects of one team.

A row holds the numbers of a :class:`~spectrim.monitor.measure.MatrixRequest` for one matrix. Each rank fills the rows
of the matrices that it owns; one sum over ranks completes the buffer on all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spectrim.distributed.collectives import Team
from spectrim.monitor.measure import KINDS, Kind, MatrixRequest, read
from spectrim.monitor.subjects import Subject

__all__ = ["Lists", "MeasurementBuffer", "PartMeasurement", "Requests", "Slot", "buffers_of"]

#: Two flags precede a subject's squared norms: it has a gradient, and a hook saw the gradient being accumulated.
HEAD = 2

#: The requests for all parts of a subject, by kind.
Requests = dict[Kind, list[MatrixRequest]]

#: A :data:`~spectrim.monitor.measure.Reading` as plain lists, one value for each matrix of a part.
Lists = dict[str, list[float]]


@dataclass(frozen=True)
class Slot:
    """The position of one part's numbers: those of ``rows`` matrices, from index ``start``."""

    request: MatrixRequest
    start: int
    rows: int

    @property
    def stop(self) -> int:
        """The index after the last number."""
        return self.start + self.rows * self.request.length

    def row(self, index: int) -> Slot:
        """The slot of one matrix of a stack."""
        return Slot(self.request, self.start + index * self.request.length, 1)


@dataclass(eq=False)
class PartMeasurement:
    """The measured numbers of one part of a parameter, on the host.

    Attributes:
        readings: the metrics, by kind.
        spectra: all singular values, descending, of each matrix that was measured exactly, by kind.
        before: the squared norm of the gradient when it was accumulated, or None if no hook saw it.
        limit: the limit of its clip, see :class:`~spectrim.monitor.step_clip.Clip`; None without one.
        mark: the threshold on the direction's singular values that corresponds to the limit.
    """

    subject: Subject
    name: str
    shape: tuple[int, ...]
    readings: dict[Kind, Lists] = field(default_factory=dict)
    spectra: dict[Kind, list[list[float]]] = field(default_factory=dict)
    before: float | None = None
    limit: float | None = None
    mark: float | None = None


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
        self.team, self.subjects = team, list(subjects)
        self._device = self.subjects[0].parameter.device
        self._heads: dict[Subject, int] = {}
        self._slots: dict[tuple[Subject, Kind], list[Slot]] = {}
        self._pieces: dict[int, Tensor] = {}
        place = 0
        for subject in self.subjects:
            self._heads[subject] = place
            place += HEAD + len(subject.names)
            for kind, requests in requests_of(subject).items():
                slots = self._slots[subject, kind] = []
                for request, shape in zip(requests, subject.shapes, strict=True):
                    slots.append(Slot(request, place, math.prod(shape[:-2])))
                    place = slots[-1].stop
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
            norm = norms.get(subject)
            if subject.parameter.grad is not None:
                self._pieces[place] = one
            if norm is not None:
                self._pieces[place + 1] = one
                if subject.counts:
                    self._pieces[place + HEAD] = norm

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

    def read(self, numbers: Tensor, marks: Mapping[Subject, Sequence[float]]) -> list[PartMeasurement]:
        """The measurements of the parts of every subject that had a gradient.

        Args:
            numbers: the result of :meth:`complete`, copied to the host.
            marks: see :attr:`PartMeasurement.mark`, for the parts of subjects that are clipped.
        """
        found: list[PartMeasurement] = []
        asked: dict[MatrixRequest, list[tuple[PartMeasurement, Slot]]] = {}
        heads = {
            subject: numbers[place : place + HEAD + len(subject.names)].tolist()
            for subject, place in self._heads.items()
        }
        for subject, (has_gradient, was_seen, *norms) in heads.items():
            if not has_gradient > 0:
                continue
            for index, (name, shape) in enumerate(zip(subject.names, subject.shapes, strict=True)):
                part = PartMeasurement(subject, name, shape)
                part.before = norms[index] if was_seen > 0 else None
                part.mark = marks[subject][index] if subject in marks else None
                for kind in KINDS:
                    for slot in self.slots(subject, kind)[index : index + 1]:
                        asked.setdefault(slot.request, []).append((part, slot))
                found.append(part)
        for request, parts in asked.items():
            _read_together(request, parts, numbers)
        return found


def _read_together(request: MatrixRequest, parts: Sequence[tuple[PartMeasurement, Slot]], numbers: Tensor) -> None:
    """Read the rows of all parts with the same request at once."""
    rows = torch.cat([numbers[slot.start : slot.stop].view(slot.rows, request.length) for _, slot in parts])
    marks = [math.nan if part.mark is None else part.mark for part, slot in parts for _ in range(slot.rows)]
    reading = read(request, rows, limit=torch.tensor(marks, dtype=torch.float64))
    spectra = reading.pop("singular_values", None)
    lists = {name: values.tolist() for name, values in reading.items()}
    start = 0
    for part, slot in parts:
        stop = start + slot.rows
        part.readings[request.kind] = {name: values[start:stop] for name, values in lists.items()}
        if spectra is not None:
            part.spectra[request.kind] = spectra[start:stop].tolist()
        start = stop


def buffers_of(subjects: Sequence[Subject], requests_of: Callable[[Subject], Requests]) -> list[MeasurementBuffer]:
    """One buffer for each team."""
    teams: dict[object, list[Subject]] = {}
    for subject in subjects:
        teams.setdefault(subject.team, []).append(subject)
    return [MeasurementBuffer(same[0].team, same, requests_of) for same in teams.values()]
