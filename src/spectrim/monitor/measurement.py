"""One measurement: which matrices are taken before a step and after it, and how they get to where they are measured.

Matrices of plain parameters are measured here, those of one shape in company. Matrices of sharded ones are put together
at owners, as for a step, and measured there. Relied on by :class:`~spectrim.monitor.monitor.SpectralMonitor`; relies on
:mod:`measure` for the numbers and on :mod:`board` for their places.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from spectrim.distributed.collectives import Team
from spectrim.distributed.owners import Journey, rounds, units
from spectrim.monitor.board import Board, Found, Orders, Slot, boards_of
from spectrim.monitor.clip import Clip, clip_of
from spectrim.monitor.measure import Kind, Order, measure
from spectrim.monitor.metrics import rank_of_spike
from spectrim.monitor.subjects import Subject
from spectrim.operators._stack import as_matrices, energy
from spectrim.optim.stacks import bucket_bytes

__all__ = ["Measurement", "Wanted", "as_float", "squared_norms"]

#: Where an optimizer keeps its momentum.
MOMENTA = ("exp_avg", "momentum_buffer")

#: What this process holds of a subject's matrices of some kind, or None where there are none.
TensorOf = Callable[[Subject], Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a measurement is of.

    Attributes:
        kinds: "gradient", "momentum", "update", "weight".
        exact: the names of which all singular values are wanted.
        rank_ratio: of the spike.
        loss_scale: what the loss was multiplied by.
    """

    kinds: Collection[str]
    exact: Set[str]
    rank_ratio: float
    loss_scale: float = 1.0


class Measurement:
    """The numbers of one step, of all subjects.

    Args:
        subjects: what is watched; of plain parameters, only what this process measures.
        optimizer: about to step.
        wanted: what to measure.
        norms: the squared norms of gradients as they were accumulated, (parts) for each subject that has one.
    """

    def __init__(
        self, subjects: Sequence[Subject], optimizer: Optimizer, wanted: Wanted, norms: Mapping[Subject, Tensor]
    ) -> None:
        self._optimizer, self._wanted, self._norms = optimizer, wanted, norms
        self._clips = {subject: self._clips_of(subject) for subject in subjects}
        self._boards = boards_of(subjects, self._orders_of)
        self._before: dict[Subject, Tensor] = {}

    def take_gradients(self) -> None:
        """Measure the gradients that the step is about to use, or has used."""
        for board in self._boards:
            board.put_heads(self._norms)
        self._fill("gradient", _gradient)

    def take_weights(self) -> None:
        """Keep a copy of the weights that the step is about to move."""
        if "update" in self._wanted.kinds:
            for board in self._boards:
                self._before |= {s: s.local(s.parameter.detach()).clone() for s in board.subjects}

    def take_step(self) -> None:
        """Measure what the step did."""
        self._fill("update", lambda subject: self._moved(subject, 1.0))
        self._fill("direction", lambda subject: self._moved(subject, self._clips[subject][0].keep))
        self._fill("weight", lambda subject: subject.local(subject.parameter.detach()))
        self._fill("momentum", self._momentum)
        self._before.clear()

    def tensors(self) -> list[Tensor]:
        """All numbers, where they are; every rank of sharded parameters calls this, and gets them."""
        limits = [clip.limit for clips in self._clips.values() for clip in clips]
        # On a device only where learning rates are.
        device = next((limit.device for limit in limits if isinstance(limit, Tensor)), None)
        flat = [torch.as_tensor(limit, dtype=torch.float64, device=device).reshape(1) for limit in limits]
        return [*(board.complete() for board in self._boards), torch.cat([_NONE, *flat] if device is None else flat)]

    def read(self, tensors: Sequence[Tensor]) -> list[Found]:
        """What the numbers say, once they are on the host."""
        *boards, flat = tensors
        limits = iter(flat.tolist())
        limits_of = {subject: [next(limits) for _ in clips] for subject, clips in self._clips.items()}
        found = [part for board, numbers in zip(self._boards, boards, strict=True) for part in board.read(numbers)]
        for part in found:
            if part.before is not None:
                part.before /= self._wanted.loss_scale**2
            if clips := self._clips[part.subject]:
                index = part.subject.names.index(part.name)
                part.limit = limits_of[part.subject][index]
                part.mark = part.limit * clips[index].share
        return found

    # -- What is wanted ------------------------------------------------------------------------------------------------

    def _orders_of(self, subject: Subject) -> Orders:
        wanted = self._wanted
        kinds: dict[Kind, bool] = {
            "gradient": "gradient" in wanted.kinds,
            "update": "update" in wanted.kinds,
            "direction": "update" in wanted.kinds and bool(self._clips[subject]),
            "weight": "weight" in wanted.kinds,
            "momentum": "momentum" in wanted.kinds and not wanted.exact.isdisjoint(subject.names),
        }
        return {kind: self._order(subject, kind) for kind, is_wanted in kinds.items() if is_wanted}

    def _order(self, subject: Subject, kind: Kind) -> list[Order]:
        found = []
        for name, shape in zip(subject.names, subject.shapes, strict=True):
            # Of weights the spike is not asked for.
            rank = 1 if kind == "weight" else rank_of_spike(shape, self._wanted.rank_ratio)
            found.append(Order(kind, (shape[-2], shape[-1]), rank, name in self._wanted.exact))
        return found

    def _clips_of(self, subject: Subject) -> list[Clip]:
        group = self._optimizer.param_groups[subject.position[0]]
        found = [clip_of(self._optimizer, group, subject.parameter, shape) for shape in subject.shapes]
        return [clip for clip in found if clip is not None]

    def _moved(self, subject: Subject, keep: float | Tensor) -> Tensor:
        """The weights minus what the step was to keep of those before, in float32 or better."""
        now = as_float(subject.local(subject.parameter.detach()))
        return now - as_float(self._before[subject]) * keep

    def _momentum(self, subject: Subject) -> Tensor | None:
        # .get: the state of torch's optimizers is a defaultdict, and asking it by key would create an entry.
        state = self._optimizer.state.get(subject.parameter, {})
        found = [state[key] for key in MOMENTA if isinstance(state.get(key), Tensor)]
        return subject.local(found[0]) if found else None

    # -- How it is measured --------------------------------------------------------------------------------------------

    def _fill(self, kind: Kind, tensor_of: TensorOf) -> None:
        """Measure one kind of matrix of all subjects that have it."""
        for board in self._boards:
            subjects = [subject for subject in board.subjects if board.slots(subject, kind)]
            if board.team is None:
                _fill_here(board, kind, subjects, tensor_of)
            else:
                _fill_at_owners(board, board.team, kind, subjects, tensor_of)


def _fill_here(board: Board, kind: Kind, subjects: Sequence[Subject], tensor_of: TensorOf) -> None:
    """Measure parts of one shape in company, as many as an operator of an optimizer would take at once."""
    alike: dict[tuple[Any, ...], list[tuple[Subject, int]]] = {}
    for subject in subjects:
        for part, slot in enumerate(board.slots(subject, kind)):
            key = (slot.order, slot.rows, subject.parameter.dtype, subject.parameter.device)
            alike.setdefault(key, []).append((subject, part))
    for same in alike.values():
        length = max(1, bucket_bytes(same[0][0].parameter) // max(1, 4 * same[0][0].parameter.numel()))
        for start in range(0, len(same), length):
            found = [
                (board.slots(subject, kind)[part], as_matrices(subject.parts(tensor)[part]))
                for subject, part in same[start : start + length]
                if (tensor := tensor_of(subject)) is not None
            ]
            if found:
                _measure(board, *zip(*found, strict=True))


def _fill_at_owners(board: Board, team: Team, kind: Kind, subjects: Sequence[Subject], tensor_of: TensorOf) -> None:
    """Send shards to owners, which measure what they put together; a shard that is not there counts as zeros."""
    loads = [0] * team.size
    for some in rounds(subjects, lambda subject: subject.parameter.shape, team.size):
        tensors = []
        for subject in some:
            tensor = tensor_of(subject)
            tensors.append(torch.zeros_like(subject.local(subject.parameter.detach())) if tensor is None else tensor)
        dtypes = {tensor.dtype for tensor in tensors}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        shardings = [subject.sharding for subject in some if subject.sharding is not None]
        journey = Journey(team, units(shardings, [subject.is_stack for subject in some]), dtype, loads)
        journey.set_out([tensor.to(dtype) for tensor in tensors])
        for number, whole in journey.wholes().items():
            unit = journey.found[number]
            subject = some[unit.tensor]
            for slot, part in zip(board.slots(subject, kind), subject.parts(whole), strict=True):
                _measure(board, [slot if unit.index is None else slot.row(unit.index)], [as_matrices(part)])


def _measure(board: Board, slots: Sequence[Slot], found: Sequence[Tensor]) -> None:
    """Measure matrices, or stacks of them, of one shape."""
    order = slots[0].order
    if order.kind == "momentum" and not order.exact:
        return
    stacked = torch.stack(list(found)) if len(found) > 1 else found[0].unsqueeze(0)
    numbers = measure(order, stacked.flatten(0, -3)).view(len(found), -1)
    for slot, rows in zip(slots, numbers, strict=True):
        board.put(slot, rows)


_NONE = torch.zeros(0, dtype=torch.float64)


def as_float(tensor: Tensor) -> Tensor:
    """The tensor in float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def squared_norms(subject: Subject, grad: Tensor) -> Tensor:
    """(parts), the squared norms of what this process holds of a gradient's parts."""
    parts = subject.local_parts(_dense(subject.local(grad)))
    return torch.stack([energy(as_matrices(part)).sum() for part in parts])


def _gradient(subject: Subject) -> Tensor | None:
    grad = subject.parameter.grad
    return None if grad is None else _dense(subject.local(grad.detach()))


def _dense(grad: Tensor) -> Tensor:
    """The gradient, that of a sparse embedding in full."""
    return grad.to_dense() if grad.is_sparse else grad
