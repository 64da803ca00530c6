"""One measurement of all matrices, before and after a step.

Matrices of plain parameters are measured in batches of one shape. Sharded matrices are gathered at owner ranks, as for
a step, and measured there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from spectrim.distributed.collectives import Team
from spectrim.distributed.owners import Loads, OwnerExchange, exchange_rounds
from spectrim.monitor.buffer import MeasurementBuffer, PartMeasurement, Requests, Slot, buffers_of
from spectrim.monitor.measure import Kind, MatrixRequest, measure
from spectrim.monitor.metrics import rank_of_spike
from spectrim.monitor.step_clip import Clip, clip_of
from spectrim.monitor.subjects import Subject
from spectrim.operators._stack import as_matrices, energy

__all__ = ["Measurement", "MeasurementRequest", "as_float", "squared_norms"]

#: Keys of optimizers' state that hold the momentum.
MOMENTA = ("exp_avg", "momentum_buffer")

#: The most bytes of matrices, in float32, in one batch; a single matrix may exceed it. On the host only small matrices
#: gain from batching, since a batch is a copy.
TOGETHER_ON_HOST, TOGETHER = 2**20, 256 * 2**20

#: Returns the local tensors of subjects for one kind of matrix; None for a subject that has none.
TensorsOf = Callable[[Sequence[Subject]], Sequence[Tensor | None]]


@dataclass(frozen=True, kw_only=True)
class MeasurementRequest:
    """What to measure.

    Attributes:
        kinds: some of "gradient", "momentum", "update", "weight".
        exact: names of the matrices for which all singular values are measured.
        rank_ratio: the share of singular values that form the spike.
        loss_scale: the factor on the loss; a tensor may be on a device.
    """

    kinds: Collection[str]
    exact: Set[str]
    rank_ratio: float
    loss_scale: float | Tensor = 1.0


class Measurement:
    """A measurement of one step.

    Args:
        subjects: the parameters to measure; those that are not sharded, on one rank only.
        optimizer: about to step.
        wanted: what to measure.
        norms: squared norms (parts) of gradients when they were accumulated.
    """

    def __init__(
        self,
        subjects: Sequence[Subject],
        optimizer: Optimizer,
        wanted: MeasurementRequest,
        norms: Mapping[Subject, Tensor],
    ) -> None:
        self._optimizer, self._wanted, self._norms = optimizer, wanted, norms
        self._clips = {subject: self._clips_of(subject) for subject in subjects}
        self._buffers = buffers_of(subjects, self._requests_of)
        self._before: dict[Subject, Tensor] = {}
        self.count = 0
        """The number of :meth:`tensors`."""

    def take_gradients(self) -> None:
        """Measure the gradients of the step."""
        for buffer in self._buffers:
            buffer.put_heads(self._norms)
        self._fill("gradient", _gradients)

    def take_weights(self) -> None:
        """Copy the weights before the step."""
        if "update" in self._wanted.kinds:
            subjects = [subject for buffer in self._buffers for subject in buffer.subjects]
            weights = _weights(subjects)
            copies = [torch.empty_like(weight) for weight in weights]
            if weights:
                torch._foreach_copy_(copies, weights)
            self._before = dict(zip(subjects, copies, strict=True))

    def take_step(self) -> None:
        """Measure updates, weights and momenta after the step."""
        self._fill("update", self._moved)
        self._fill("direction", lambda subjects: self._moved(subjects, of_direction=True))
        self._fill("weight", _weights)
        self._fill("momentum", self._momenta)
        self._before.clear()

    def tensors(self) -> list[Tensor]:
        """All numbers, on their devices. Every rank of sharded parameters calls this."""
        # Limits are tensors if learning rates are.
        limits = [clip.limit for clips in self._clips.values() for clip in clips]
        there = [limit for limit in (*limits, self._wanted.loss_scale) if isinstance(limit, Tensor)]
        found = [*(buffer.complete() for buffer in self._buffers), *(limit.detach().reshape(1) for limit in there)]
        self.count = len(found)
        return found

    def read(self, hosts: Sequence[Tensor]) -> list[PartMeasurement]:
        """The measurements of all parts.

        Args:
            hosts: the :meth:`tensors`, copied to the host.
        """
        buffers, rest = hosts[: len(self._buffers)], iter(hosts[len(self._buffers) :])
        limits = {
            subject: [float(next(rest)) if isinstance(clip.limit, Tensor) else clip.limit for clip in clips]
            for subject, clips in self._clips.items()
            if clips
        }
        scale = self._wanted.loss_scale
        scale = float(next(rest)) if isinstance(scale, Tensor) else scale
        marks = {
            subject: [limit * clip.share for limit, clip in zip(of, self._clips[subject], strict=True)]
            for subject, of in limits.items()
        }
        found = [p for buffer, numbers in zip(self._buffers, buffers, strict=True) for p in buffer.read(numbers, marks)]
        for part in found:
            if part.before is not None:
                part.before /= scale**2
            if part.subject in limits:
                part.limit = limits[part.subject][part.subject.names.index(part.name)]
        return found

    # -- What is wanted ------------------------------------------------------------------------------------------------

    def _requests_of(self, subject: Subject) -> Requests:
        wanted = self._wanted
        kinds: dict[Kind, bool] = {
            "gradient": "gradient" in wanted.kinds,
            "update": "update" in wanted.kinds,
            "direction": "update" in wanted.kinds and bool(self._clips[subject]),
            "weight": "weight" in wanted.kinds,
            "momentum": "momentum" in wanted.kinds and not wanted.exact.isdisjoint(subject.names),
        }
        return {kind: self._request(subject, kind) for kind, is_wanted in kinds.items() if is_wanted}

    def _request(self, subject: Subject, kind: Kind) -> list[MatrixRequest]:
        wanted = self._wanted
        return [
            _request(kind, (shape[-2], shape[-1]), wanted.rank_ratio, name in wanted.exact)
            for name, shape in zip(subject.names, subject.shapes, strict=True)
        ]

    def _clips_of(self, subject: Subject) -> list[Clip]:
        group = self._optimizer.param_groups[subject.position[0]]
        found = [clip_of(self._optimizer, group, subject.parameter, shape) for shape in subject.shapes]
        return [clip for clip in found if clip is not None]

    def _moved(self, subjects: Sequence[Subject], *, of_direction: bool = False) -> Sequence[Tensor]:
        """The weights minus those before the step, in float32 or wider; for a direction, the latter after decay."""
        now = [as_float(weight) for weight in _weights(subjects)]
        before = [as_float(self._before[subject]) for subject in subjects]
        if of_direction:
            keeps = [self._clips[subject][0].keep for subject in subjects]
            before = [kept * keep for kept, keep in zip(before, keeps, strict=True)]
        return torch._foreach_sub(now, before) if now else []

    def _momenta(self, subjects: Sequence[Subject]) -> Sequence[Tensor | None]:
        found: list[Tensor | None] = []
        for subject in subjects:
            # The state is a defaultdict, in which state[parameter] would create an entry.
            state = self._optimizer.state.get(subject.parameter, {})
            held = [state[key] for key in MOMENTA if isinstance(state.get(key), Tensor)]
            found.append(subject.local(held[0]) if held else None)
        return found

    # -- How it is measured --------------------------------------------------------------------------------------------

    def _fill(self, kind: Kind, tensors_of: TensorsOf) -> None:
        """Measure one kind of matrix for all subjects that have a request for it."""
        for buffer in self._buffers:
            subjects = [subject for subject in buffer.subjects if buffer.slots(subject, kind)]
            if buffer.team is None:
                _fill_here(buffer, kind, subjects, tensors_of)
            else:
                _fill_at_owners(buffer, buffer.team, kind, subjects, tensors_of)


@cache
def _request(kind: Kind, shape: tuple[int, int], rank_ratio: float, exact: bool) -> MatrixRequest:
    """The request for a matrix; cached, so that its fields are computed once."""
    # The spike of weights is not measured.
    return MatrixRequest(kind, shape, 1 if kind == "weight" else rank_of_spike(shape, rank_ratio), exact)


def _fill_here(buffer: MeasurementBuffer, kind: Kind, subjects: Sequence[Subject], tensors_of: TensorsOf) -> None:
    """Measure parts with equal smaller sides in batches."""
    for some in _batches(subjects):
        # Parts of one shape form a stack; stacks with as many numbers are measured in one batch.
        alike: dict[tuple[Any, ...], dict[tuple[MatrixRequest, int], list[tuple[Slot, Tensor]]]] = {}
        for subject, tensor in zip(some, tensors_of(some), strict=True):
            if tensor is not None:
                for slot, part in zip(buffer.slots(subject, kind), subject.parts(tensor), strict=True):
                    request = slot.request
                    key = (min(request.shape), request.rank, request.exact, part.dtype, part.device)
                    same = alike.setdefault(key, {}).setdefault((request, slot.rows), [])
                    same.append((slot, part))
        for stacks in alike.values():
            _measure(buffer, list(stacks.values()))


def _batches(subjects: Sequence[Subject]) -> Iterator[list[Subject]]:
    """Divide subjects into lists that are small enough for one batch, sorted by their smaller sides."""
    batch: list[Subject] = []
    held = 0
    for subject in sorted(subjects, key=lambda subject: [(min(shape[-2:]), *shape) for shape in subject.shapes]):
        size = 4 * subject.parameter.numel()
        limit = TOGETHER_ON_HOST if subject.parameter.device.type == "cpu" else TOGETHER
        if batch and held + size > limit:
            yield batch
            batch, held = [], 0
        batch.append(subject)
        held += size
    if batch:
        yield batch


def _fill_at_owners(
    buffer: MeasurementBuffer, team: Team, kind: Kind, subjects: Sequence[Subject], tensors_of: TensorsOf
) -> None:
    """Send shards to owners, which measure the whole matrices; a missing shard counts as zeros."""
    loads: Loads = {}
    for some in exchange_rounds(subjects, lambda subject: subject.parameter.shape, team.size):
        tensors = [
            torch.zeros_like(weight) if tensor is None else tensor
            for tensor, weight in zip(tensors_of(some), _weights(some), strict=True)
        ]
        dtypes = {tensor.dtype for tensor in tensors}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        shardings = [subject.sharding for subject in some if subject.sharding is not None]
        exchange = OwnerExchange(team, shardings, [subject.is_stack for subject in some], dtype, loads)
        exchange.send([tensor.to(dtype) for tensor in tensors])
        for number, whole in exchange.wholes().items():
            unit = exchange.units[number]
            subject = some[unit.tensor]
            for slot, part in zip(buffer.slots(subject, kind), subject.parts(whole), strict=True):
                _measure(buffer, [[(slot if unit.index is None else slot.row(unit.index), part)]])


def _measure(buffer: MeasurementBuffer, found: Sequence[Sequence[tuple[Slot, Tensor]]]) -> None:
    """Measure matrices or stacks, in lists of one shape each; all have the same smaller side."""
    request = found[0][0][0].request
    if request.kind == "momentum" and not request.exact:
        return
    stacks = [torch.stack([part for _, part in same]) if len(same) > 1 else same[0][1][None] for same in found]
    numbers = measure(request, *(stack.flatten(0, -3) for stack in stacks)).flatten()
    slots = [slot for same in found for slot, _ in same]
    for slot, rows in zip(slots, torch.split(numbers, [slot.rows * request.length for slot in slots]), strict=True):
        buffer.put(slot, rows)


def as_float(tensor: Tensor) -> Tensor:
    """The tensor in float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def squared_norms(subjects: Sequence[Subject]) -> dict[Subject, Tensor]:
    """The squared norms (parts) of the local gradient of each subject that has one."""
    found: dict[Subject, Tensor] = {}
    having: dict[torch.device, list[tuple[Subject, list[Tensor]]]] = {}
    for subject, grad in zip(subjects, _gradients(subjects), strict=True):
        if grad is not None:
            having.setdefault(grad.device, []).append((subject, subject.local_parts(grad)))
    for device, some in having.items():
        parts = [part for _, of_one in some for part in of_one]
        if device.type == "cpu":
            squares = torch.stack([energy(as_matrices(part)).sum() for part in parts])
        else:
            squares = torch.stack(torch._foreach_norm(parts, 2, dtype=torch.float64)).square()
        each = torch.split(squares, [len(of_one) for _, of_one in some])
        found |= {subject: norms for (subject, _), norms in zip(some, each, strict=True)}
    return found


def _weights(subjects: Sequence[Subject]) -> list[Tensor]:
    return [subject.local(subject.parameter.detach()) for subject in subjects]


def _gradients(subjects: Sequence[Subject]) -> list[Tensor | None]:
    """Local gradients; sparse ones are made dense."""
    grads = [subject.parameter.grad for subject in subjects]
    local = [None if g is None else s.local(g.detach()) for s, g in zip(subjects, grads, strict=True)]
    return [g.to_dense() if g is not None and g.is_sparse else g for g in local]
