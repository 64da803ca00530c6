"""One measurement of all matrices, before and after a step.

Matrices of plain parameters are measured in batches of one smaller side. Sharded matrices are gathered at owner ranks,
as for a step, and measured there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from spectrim.distributed.collectives import Team
from spectrim.distributed.owners import Loads, OwnerExchange, exchange_rounds
from spectrim.monitor.buffer import MeasurementBuffer, PartMeasurement, Requests, Slot
from spectrim.monitor.metrics import Kind, MatrixRequest, measure, rank_of_spike
from spectrim.monitor.step_clip import clips_of
from spectrim.monitor.subjects import Subject
from spectrim.operators._stack import as_matrices, energy

__all__ = ["Measurement", "as_float", "squared_norms"]

#: Keys of optimizers' state that hold the momentum.
MOMENTA = ("exp_avg", "momentum_buffer")

#: The most bytes of matrices, in float32, in one batch; a single matrix may exceed it. On the host only small matrices
#: gain from batching, since a batch is a copy.
TOGETHER_ON_HOST, TOGETHER = 2**20, 512 * 2**20


class Measurement:
    """A measurement of one step.

    Args:
        subjects: the parameters to measure; those that are not sharded, on one rank only.
        optimizer: about to step.
        norms: squared norms (parts) of gradients when they were accumulated.
        kinds: some of "gradient", "momentum", "update", "weight".
        exact: names of the matrices for which all singular values are measured.
        rank_ratio: the share of singular values that form the spike.
        loss_scale: the factor on the loss; a tensor may be on a device.
    """

    def __init__(
        self,
        subjects: Sequence[Subject],
        optimizer: Optimizer,
        norms: Mapping[Subject, Tensor],
        *,
        kinds: Collection[str],
        exact: Set[str],
        rank_ratio: float,
        loss_scale: float | Tensor = 1.0,
    ) -> None:
        self._optimizer, self._norms, self._kinds = optimizer, norms, kinds
        self._exact, self._rank_ratio, self._loss_scale = exact, rank_ratio, loss_scale
        self._clips = clips_of(optimizer, subjects)
        teams: dict[Team | None, list[Subject]] = {}
        for subject in subjects:
            teams.setdefault(subject.team, []).append(subject)
        self._buffers = [MeasurementBuffer(team, same, self._requests_of) for team, same in teams.items()]
        self._before: dict[Subject, Tensor] = {}
        # Limits are tensors if learning rates are; clips of one group share them.
        scalars = (*(clip.limit for clip in self._clips.values()), loss_scale)
        self._scalars = list({id(value): value for value in scalars if isinstance(value, Tensor)}.values())
        self.count = len(self._buffers) + len(self._scalars)
        """The number of :meth:`tensors`."""

    def take_gradients(self) -> None:
        """Measure the gradients of the step."""
        for buffer in self._buffers:
            buffer.put_heads(self._norms)
        self._fill("gradient")

    def take_weights(self) -> None:
        """Copy the weights before the step."""
        if "update" in self._kinds:
            subjects = [subject for buffer in self._buffers for subject in buffer.subjects]
            weights = _weights(subjects)
            copies = [torch.empty_like(weight) for weight in weights]
            if weights:
                torch._foreach_copy_(copies, weights)
            self._before = dict(zip(subjects, copies, strict=True))

    def take_step(self) -> None:
        """Measure updates, weights and momenta after the step."""
        self._fill("update", "weight")
        self._fill("direction")
        self._fill("momentum")
        self._before.clear()

    def tensors(self) -> list[Tensor]:
        """All numbers, on their devices. Every rank of sharded parameters calls this."""
        buffers = [buffer.complete() for buffer in self._buffers]
        return [*buffers, *(scalar.detach().reshape(1) for scalar in self._scalars)]

    def read(self, hosts: Sequence[Tensor]) -> list[PartMeasurement]:
        """The measurements of all parts.

        Args:
            hosts: the :meth:`tensors`, copied to the host.
        """
        numbers = {id(own): float(host) for own, host in zip(self._scalars, hosts[len(self._buffers) :], strict=True)}

        def number(value: float | Tensor) -> float:
            return numbers[id(value)] if isinstance(value, Tensor) else value

        limits = {subject: (number(clip.limit), clip.share) for subject, clip in self._clips.items()}
        found = [part for buffer, own in zip(self._buffers, hosts, strict=False) for part in buffer.read(own, limits)]
        for part in found:
            if part.before is not None:
                part.before /= number(self._loss_scale) ** 2
        return found

    # -- What is measured ----------------------------------------------------------------------------------------------

    def _requests_of(self, subject: Subject) -> Requests:
        wanted: dict[Kind, bool] = {
            "gradient": "gradient" in self._kinds,
            "update": "update" in self._kinds,
            "direction": "update" in self._kinds and subject in self._clips,
            "weight": "weight" in self._kinds,
            "momentum": "momentum" in self._kinds and not self._exact.isdisjoint(subject.names),
        }
        parts = list(zip(subject.names, subject.shapes, strict=True))
        return {
            kind: [
                _request(kind, (shape[-2], shape[-1]), self._rank_ratio, name in self._exact) for name, shape in parts
            ]
            for kind, is_wanted in wanted.items()
            if is_wanted
        }

    def _tensors(self, kind: Kind, subjects: Sequence[Subject]) -> Sequence[Tensor | None]:
        """The local tensors of one kind; None for a subject that has none."""
        if kind == "gradient":
            return _gradients(subjects)
        if kind == "momentum":
            return [self._momentum(subject) for subject in subjects]
        weights = _weights(subjects)
        if kind == "weight" or not weights:
            return weights
        # Differences are in float32 or wider.
        before = [as_float(self._before[subject]) for subject in subjects]
        if kind == "direction":
            keeps: Any = [self._clips[subject].keep for subject in subjects]
            if any(isinstance(keep, Tensor) for keep in keeps):
                before = [weight * keep for weight, keep in zip(before, keeps, strict=True)]
            else:
                before = list(torch._foreach_mul(before, keeps))
        return torch._foreach_sub([as_float(weight) for weight in weights], before)

    def _momentum(self, subject: Subject) -> Tensor | None:
        # The state is a defaultdict, in which state[parameter] would create an entry.
        state = self._optimizer.state.get(subject.parameter, {})
        held = [state[key] for key in MOMENTA if isinstance(state.get(key), Tensor)]
        return subject.local(held[0]) if held else None

    # -- How it is measured --------------------------------------------------------------------------------------------

    def _fill(self, *kinds: Kind) -> None:
        """Measure some kinds of matrices for all subjects that have requests for them."""
        for buffer in self._buffers:
            if buffer.team is None:
                self._fill_here(buffer, kinds)
            else:
                for kind in kinds:
                    self._fill_at_owners(buffer, buffer.team, kind)

    def _fill_here(self, buffer: MeasurementBuffer, kinds: Sequence[Kind]) -> None:
        """Measure parts with equal smaller sides in batches."""
        for some in _batches(buffer.subjects, len(kinds)):
            # Parts of one shape form a stack; stacks with as many numbers are measured in one batch.
            alike: dict[tuple[Any, ...], dict[tuple[int, ...], list[tuple[Slot, Tensor]]]] = {}
            for kind in kinds:
                asked = [subject for subject in some if buffer.slots(subject, kind)]
                for subject, tensor in zip(asked, self._tensors(kind, asked), strict=True):
                    if tensor is not None:
                        for slot, part in zip(buffer.slots(subject, kind), subject.parts(tensor), strict=True):
                            request = slot.request
                            key = (min(request.shape), request.rank, request.exact, part.dtype, part.device)
                            alike.setdefault(key, {}).setdefault(tuple(part.shape), []).append((slot, part))
            for stacks in alike.values():
                _measure(buffer, list(stacks.values()))

    def _fill_at_owners(self, buffer: MeasurementBuffer, team: Team, kind: Kind) -> None:
        """Send shards to owners, which measure the whole matrices; a missing shard counts as zeros."""
        subjects = [subject for subject in buffer.subjects if buffer.slots(subject, kind)]
        loads: Loads = {}
        for some in exchange_rounds(subjects, lambda subject: subject.parameter.shape, team.size):
            tensors = [
                torch.zeros_like(weight) if tensor is None else tensor
                for tensor, weight in zip(self._tensors(kind, some), _weights(some), strict=True)
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


@cache
def _request(kind: Kind, shape: tuple[int, int], rank_ratio: float, exact: bool) -> MatrixRequest:
    """The request for a matrix; cached, so that its fields are computed once."""
    return MatrixRequest(kind, shape, rank_of_spike(shape, rank_ratio), exact)


def _batches(subjects: Sequence[Subject], kinds: int) -> Iterator[list[Subject]]:
    """Divide subjects into lists that are small enough for one batch, sorted by their smaller sides."""
    batch: list[Subject] = []
    held = 0
    for subject in sorted(subjects, key=lambda subject: [(min(shape[-2:]), *shape) for shape in subject.shapes]):
        size = 4 * kinds * subject.parameter.numel()
        limit = TOGETHER_ON_HOST if subject.parameter.device.type == "cpu" else TOGETHER
        if batch and held + size > limit:
            yield batch
            batch, held = [], 0
        batch.append(subject)
        held += size
    if batch:
        yield batch


def _measure(buffer: MeasurementBuffer, found: Sequence[Sequence[tuple[Slot, Tensor]]]) -> None:
    """Measure matrices or stacks, in lists of one shape each; all have the same smaller side."""
    request = found[0][0][0].request
    if request.kind == "momentum" and not request.exact:
        return
    stacks = [torch.stack([part for _, part in same]) if len(same) > 1 else same[0][1][None] for same in found]
    numbers = measure(request, *(stack.flatten(0, -3) for stack in stacks)).flatten()
    slots = [slot for same in found for slot, _ in same]
    for slot, rows in zip(slots, torch.split(numbers, [slot.size for slot in slots]), strict=True):
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
