"""One measurement: what is taken before a step and after it, and how the numbers of all matrices come to the host.

Numbers of every matrix have their places in one tensor of the device, which the host reads once. Matrices of sharded
parameters are put together at owners, as for a step, and measured there; one sum brings the numbers to every rank.
Relied on by :class:`~spectrim.monitor.monitor.SpectralMonitor`; relies on :mod:`measure`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from spectrim.distributed.collectives import Team
from spectrim.distributed.owners import Journey, units
from spectrim.monitor.clip import Clip, clip_of
from spectrim.monitor.measure import Kind, Order, measure
from spectrim.monitor.metrics import rank_of_spike
from spectrim.monitor.subjects import Subject
from spectrim.operators._stack import as_matrices, energy
from spectrim.optim.entries import stack_length

__all__ = ["Found", "Measurement", "Wanted"]

#: Where an optimizer keeps its momentum.
MOMENTA = ("exp_avg", "momentum_buffer")
#: Bytes of matrices, in float32, that each owner holds at once; one matrix always may.
ROUND_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a measurement is of.

    Attributes:
        kinds: "gradient", "momentum", "update", "weight".
        exact: the names of which all singular values are wanted.
        rank_ratio: of the spike.
    """

    kinds: Collection[str]
    exact: Set[str]
    rank_ratio: float


@dataclass(eq=False)
class Found:
    """What was found of one part of a parameter, on the host.

    Attributes:
        orders: what was measured, by kind.
        numbers: (E, length), by kind.
        before: the squared norm of the gradient when it was accumulated, or None where no hook saw it.
        mark: of its clip, see :class:`~spectrim.monitor.clip.Clip`; None without one.
    """

    subject: Subject
    name: str
    shape: tuple[int, ...]
    orders: dict[Kind, Order] = field(default_factory=dict)
    numbers: dict[Kind, Tensor] = field(default_factory=dict)
    before: float | None = None
    mark: float | None = None


@dataclass(frozen=True)
class _Slot:
    """Where the numbers of one part are: E rows from ``start``."""

    order: Order
    start: int
    rows: int

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.order.length


Matrices = Callable[[Subject], Tensor | None]


class Measurement:
    """The numbers of one step, of all subjects.

    Args:
        subjects: what is watched; of plain parameters, only what this process measures.
        optimizer: about to step.
        wanted: what to measure.
        norms: the squared norms of gradients as they were accumulated, (parts) for each subject that has one.
        loss_scale: what the loss was multiplied by.
    """

    def __init__(
        self,
        subjects: Sequence[Subject],
        optimizer: Optimizer,
        wanted: Wanted,
        norms: Mapping[Subject, Tensor],
        loss_scale: float,
    ) -> None:
        self._optimizer = optimizer
        self._wanted = wanted
        self._teams: list[tuple[Team | None, list[Subject]]] = []
        for subject in subjects:
            self._subjects_of(subject.team).append(subject)
        self._clips = {s: self._clips_of(s) for _, found in self._teams for s in found}
        self._slots: dict[tuple[Subject, Kind], list[_Slot]] = {}
        self._lengths = [self._lay_out(found) for _, found in self._teams]
        self._numbers: list[Tensor] = []
        self._norms, self._loss_scale = norms, loss_scale
        self._before: dict[Subject, Tensor] = {}

    def take_gradients(self) -> None:
        """Measure the gradients that the step is about to use, or has used."""
        self._numbers = [
            torch.zeros(length, dtype=torch.float64, device=found[0].parameter.device)
            for (_, found), length in zip(self._teams, self._lengths, strict=True)
        ]
        self._fill("gradient", _gradient)
        for index, (_, found) in enumerate(self._teams):
            for place, subject in enumerate(found):
                present = float(subject.parameter.grad is not None)
                norm = self._norms.get(subject)
                head = self._numbers[index][place * _HEAD : (place + 1) * _HEAD]
                head[0] = present
                head[1] = float(norm is not None)
            self._put_norms(index, found)

    def take_weights(self) -> None:
        """Keep a copy of the weights that the step is about to move."""
        if "update" in self._wanted.kinds:
            for _, found in self._teams:
                for subject in found:
                    self._before[subject] = subject.local(subject.parameter.detach()).clone()

    def take_step(self) -> None:
        """Measure what the step did."""
        self._fill("update", lambda subject: self._moved(subject, 1.0))
        self._fill("direction", self._direction)
        self._fill("weight", lambda subject: subject.local(subject.parameter.detach()))
        self._fill("momentum", self._momentum)
        self._before.clear()

    def read(self) -> list[Found]:
        """Bring all numbers to the host; every rank of sharded parameters calls this, and gets them."""
        for (team, _), numbers in zip(self._teams, self._numbers, strict=True):
            if team is not None:
                team.sum(numbers, "monitor")
        hosts = on_host([*self._numbers, self._marks()])
        marks = iter(hosts.pop().tolist())
        found: list[Found] = []
        for (_, subjects), numbers in zip(self._teams, hosts, strict=True):
            for place, subject in enumerate(subjects):
                limits = [next(marks) for _ in self._clips[subject]]
                if numbers[place * _HEAD] > 0:
                    found += self._found(subject, numbers, place, len(subjects), limits)
        return found

    # -- Where numbers are ---------------------------------------------------------------------------------------------

    def _subjects_of(self, team: Team | None) -> list[Subject]:
        for other, found in self._teams:
            if (other and other.key) == (team and team.key):
                return found
        self._teams.append((team, []))
        return self._teams[-1][1]

    def _lay_out(self, subjects: Sequence[Subject]) -> int:
        """Give every number of a team's subjects a place: first two of each subject, then norms, then orders."""
        start = _HEAD * len(subjects) + sum(len(subject.names) for subject in subjects)
        for subject in subjects:
            for kind in self._kinds(subject):
                slots = []
                for name, shape in zip(subject.names, subject.shapes, strict=True):
                    order = Order(
                        kind,
                        (shape[-2], shape[-1]),
                        1 if kind == "weight" else rank_of_spike(shape, self._wanted.rank_ratio),
                        name in self._wanted.exact,
                    )
                    slots.append(_Slot(order, start, math.prod(shape[:-2])))
                    start = slots[-1].stop
                self._slots[subject, kind] = slots
        return start

    def _kinds(self, subject: Subject) -> Iterator[Kind]:
        wanted = self._wanted.kinds
        if "gradient" in wanted:
            yield "gradient"
        if "update" in wanted:
            yield "update"
            if self._clips[subject]:
                yield "direction"
        if "weight" in wanted:
            yield "weight"
        if "momentum" in wanted and not self._wanted.exact.isdisjoint(subject.names):
            yield "momentum"

    def _put_norms(self, index: int, subjects: Sequence[Subject]) -> None:
        start = _HEAD * len(subjects)
        for subject in subjects:
            stop = start + len(subject.names)
            norm = self._norms.get(subject)
            if norm is not None and subject.counts:
                self._numbers[index][start:stop] = norm.to(self._numbers[index].device)
            start = stop

    def _found(
        self, subject: Subject, numbers: Tensor, place: int, count: int, limits: Sequence[float]
    ) -> Iterator[Found]:
        hooked = numbers[place * _HEAD + 1] > 0
        ahead = sum(len(other.names) for other in self._teams_subjects(subject)[:place])
        for index, (name, shape) in enumerate(zip(subject.names, subject.shapes, strict=True)):
            found = Found(subject, name, shape)
            if hooked:
                found.before = float(numbers[_HEAD * count + ahead + index]) / self._loss_scale**2
            if limits:
                found.mark = limits[index]
            for kind in self._kinds(subject):
                slot = self._slots[subject, kind][index]
                if kind == "momentum" and not slot.order.exact:
                    continue
                found.orders[kind] = slot.order
                found.numbers[kind] = numbers[slot.start : slot.stop].view(slot.rows, slot.order.length)
            yield found

    def _teams_subjects(self, subject: Subject) -> list[Subject]:
        return next(found for _, found in self._teams if subject in found)

    # -- What is measured ----------------------------------------------------------------------------------------------

    def _fill(self, kind: Kind, tensor_of: Matrices) -> None:
        """Measure one kind of matrix of all subjects that have it."""
        for index, (team, subjects) in enumerate(self._teams):
            having = [subject for subject in subjects if (subject, kind) in self._slots]
            if team is not None:
                self._fill_sharded(index, team, kind, having, tensor_of)
                continue
            alike: dict[tuple[Any, ...], list[tuple[Subject, int]]] = {}
            for subject in having:
                for part, slot in enumerate(self._slots[subject, kind]):
                    key = (slot.order, slot.rows, subject.parameter.dtype, subject.parameter.device)
                    alike.setdefault(key, []).append((subject, part))
            for same in alike.values():
                length = max(1, stack_length(same[0][0].parameter))
                for start in range(0, len(same), length):
                    self._fill_bucket(index, kind, same[start : start + length], tensor_of)

    def _fill_bucket(self, index: int, kind: Kind, bucket: Sequence[tuple[Subject, int]], tensor_of: Matrices) -> None:
        found, slots = [], []
        for subject, part in bucket:
            tensor = tensor_of(subject)
            if tensor is not None:
                found.append(as_matrices(subject.parts(tensor)[part]))
                slots.append(self._slots[subject, kind][part])
        if found:
            self._measure(index, slots, found)

    def _measure(self, index: int, slots: Sequence[_Slot], found: Sequence[Tensor]) -> None:
        """Measure matrices, or stacks of them, of one shape, into their places."""
        order = slots[0].order
        if order.kind == "momentum" and not order.exact:
            return
        stacked = torch.stack(list(found)) if len(found) > 1 else found[0].unsqueeze(0)
        numbers = measure(order, stacked.flatten(0, -3)).view(len(found), -1)
        for slot, row in zip(slots, numbers, strict=True):
            self._numbers[index][slot.start : slot.start + row.numel()] = row.to(self._numbers[index].device)

    def _fill_sharded(
        self, index: int, team: Team, kind: Kind, subjects: Sequence[Subject], tensor_of: Matrices
    ) -> None:
        loads = [0] * team.size
        for some in _rounds(subjects, team.size):
            tensors = []
            for subject in some:
                tensor = tensor_of(subject)
                local = subject.local(subject.parameter.detach())
                tensors.append(torch.zeros_like(local) if tensor is None else tensor)
            shardings = [subject.sharding for subject in some if subject.sharding is not None]
            dtypes = {tensor.dtype for tensor in tensors}
            dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
            journey = Journey(team, units(shardings, [subject.is_stack for subject in some]), dtype, loads)
            journey.set_out([tensor.to(dtype) for tensor in tensors])
            for number, whole in journey.wholes().items():
                unit = journey.found[number]
                subject = some[unit.tensor]
                for slot, part in zip(self._slots[subject, kind], subject.parts(whole), strict=True):
                    row = (unit.index or 0) * slot.order.length
                    self._measure(index, [_Slot(slot.order, slot.start + row, 1)], [as_matrices(part)])

    def _clips_of(self, subject: Subject) -> list[Clip]:
        group = self._optimizer.param_groups[subject.position[0]]
        found = [clip_of(self._optimizer, group, subject.parameter, shape) for shape in subject.shapes]
        return [clip for clip in found if clip is not None]

    def _marks(self) -> Tensor:
        """The marks of all clips; on the device only where learning rates are."""
        marks = [clip.mark for _, found in self._teams for subject in found for clip in self._clips[subject]]
        device = next((mark.device for mark in marks if isinstance(mark, Tensor)), None)
        return torch.stack([torch.as_tensor(mark, dtype=torch.float64, device=device) for mark in marks] or [_NOTHING])

    def _moved(self, subject: Subject, keep: float | Tensor) -> Tensor:
        """The weights minus what the step was to keep of those before, in float32 or better."""
        now = as_float(subject.local(subject.parameter.detach()))
        return now - as_float(self._before[subject]) * keep

    def _direction(self, subject: Subject) -> Tensor:
        return self._moved(subject, self._clips[subject][0].keep)

    def _momentum(self, subject: Subject) -> Tensor | None:
        # .get: the state of torch's optimizers is a defaultdict, and asking it by key would create an entry.
        state = self._optimizer.state.get(subject.parameter, {})
        found = [state[key] for key in MOMENTA if isinstance(state.get(key), Tensor)]
        return subject.local(found[0]) if found else None


#: Numbers at the head of every subject: whether it has a gradient, and whether a hook saw it.
_HEAD = 2


_NOTHING = torch.zeros((), dtype=torch.float64)


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Flat tensors on the host, in one read of each device."""
    found: dict[int, Tensor] = {}
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        indices = [index for index, tensor in enumerate(tensors) if tensor.device == device]
        read = torch.cat([tensors[index] for index in indices]).cpu()
        found.update(zip(indices, torch.split(read, [len(tensors[index]) for index in indices]), strict=True))
    return [found[index] for index in range(len(tensors))]


def as_float(tensor: Tensor) -> Tensor:
    """The tensor in float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def dense(grad: Tensor) -> Tensor:
    """The gradient, that of a sparse embedding in full."""
    return grad.to_dense() if grad.is_sparse else grad


def squared_norms(subject: Subject, grad: Tensor) -> Tensor:
    """(parts), the squared norms of what this process holds of a gradient's parts."""
    local = dense(subject.local(grad))
    return torch.stack([energy(as_matrices(part)).sum() for part in subject.local_parts(local)])


def _gradient(subject: Subject) -> Tensor | None:
    grad = subject.parameter.grad
    return None if grad is None else dense(subject.local(grad.detach()))


def _rounds(subjects: Sequence[Subject], members: int) -> Iterator[list[Subject]]:
    """Subjects in order, as many together as fill every owner's room."""
    some: list[Subject] = []
    room = ROUND_BYTES * members
    for subject in subjects:
        size = 4 * math.prod(subject.parameter.shape)
        if some and size > room:
            yield some
            some, room = [], ROUND_BYTES * members
        some.append(subject)
        room -= size
    if some:
        yield some
