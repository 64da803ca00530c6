"""Estimates the root mean square of every update after every step, from a fixed sample of entries.

After each step, one launch copies about a thousand entries of every matrix. Differences between steps are computed
later, for many steps at once. Every rank samples its own shard of a sharded matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from spectrim.distributed.collectives import Team
from spectrim.monitor.measurement import as_float
from spectrim.monitor.sketch import sample_stride
from spectrim.monitor.subjects import Subject

__all__ = ["SAMPLE", "UpdateSampler", "UpdateSamples", "Values"]

#: The most entries of a matrix in the sample. Their root mean square has an error of 2 to 3 %.
SAMPLE = 1024

#: Name of a matrix -> its "update_rms" and "lr" in a step.
Values = dict[str, dict[str, float]]

#: The learning rates of all groups in a step; None for those on a device.
Rates = list[float | None]


class UpdateSampler:
    """Samples the entries of subjects.

    Args:
        subjects: the parameters to sample; those that are not sharded, on one rank only.
    """

    def __init__(self, subjects: Sequence[Subject]) -> None:
        samples: dict[tuple[Any, ...], _TeamSample] = {}
        for subject in subjects:
            key = (subject.team, subject.parameter.device, subject.parameter.dtype)
            samples.setdefault(key, _TeamSample(subject.team)).subjects.append(subject)
        self._samples = list(samples.values())
        self._groups = {name: subject.position[0] for subject in subjects for name in subject.names}
        self._steps: list[tuple[int, Rates]] = []
        self._moved: list[Tensor] = []

    def before(self) -> None:
        """Sample the weights before a step, if they have changed since the step before."""
        for sample in self._samples:
            sample.begin()

    def after(self, step: int, groups: Sequence[Mapping[str, Any]]) -> None:
        """Sample the weights after a step."""
        for sample in self._samples:
            sample.compare()
        rates = [group.get("lr", 1.0) for group in groups] if self._samples else []
        there = [lr.detach().reshape(1) for lr in rates if _is_on_device(lr)]
        self._steps.append((step, [None if _is_on_device(lr) else float(lr) for lr in rates]))
        if there:
            # A copy, since a scheduler overwrites them.
            self._moved.append(torch.cat(there))

    def __len__(self) -> int:
        return len(self._steps)

    def take(self) -> UpdateSamples:
        """The samples since the last call, on their devices. All ranks of sharded parameters call it."""
        steps, self._steps = self._steps, []
        moved, self._moved = self._moved, []
        names = [sample.names for sample in self._samples]
        sums = [sample.total() for sample in self._samples] if steps else []
        return UpdateSamples(steps, names, self._groups, sums, [torch.cat(moved)] if moved else [])


@dataclass(frozen=True)
class UpdateSamples:
    """The samples of consecutive steps."""

    steps: list[tuple[int, Rates]]
    names: list[list[str]]
    groups: dict[str, int]
    sums: list[Tensor]
    moved: list[Tensor]

    def tensors(self) -> list[Tensor]:
        """The tensors to copy to the host for :meth:`read`."""
        return [*self.sums, *self.moved]

    def read(self, hosts: Sequence[Tensor]) -> list[tuple[int, Values]]:
        """The values of every step.

        Args:
            hosts: the :meth:`tensors`, copied to the host.
        """
        moved = iter(hosts[-1].tolist() if self.moved else ())
        rows = [host.view(len(self.steps), -1).sqrt().tolist() for host in hosts[: len(self.sums)]]
        found: list[tuple[int, Values]] = []
        for index, (step, rates) in enumerate(self.steps):
            lrs = [next(moved) if lr is None else lr for lr in rates]
            values: Values = {}
            for names, row in zip(self.names, rows, strict=True):
                for name, rms in zip(names, row[index], strict=True):
                    values[name] = {"update_rms": rms, "lr": lrs[self.groups[name]]}
            found.append((step, values))
        return found


class _TeamSample:
    """The sample of the subjects of one team, device and dtype.

    In a step the host checks addresses and versions, and concatenates. Differences are computed for many steps at once;
    until then, at most two copies are kept for each step.
    """

    def __init__(self, team: Team | None) -> None:
        self.team = team
        self.subjects: list[Subject] = []
        self._sample: Tensor | None = None
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._sums: list[Tensor] = []
        self._addresses: list[int] = []
        self._versions: list[int] = []
        self._entries: list[Tensor] = []
        self._copies = False
        self._grids: list[tuple[int, Tensor]] = []
        self._sizes: list[tuple[int, int]] = []
        self._lengths: Tensor | None = None
        self._factors: Tensor | None = None

    @property
    def names(self) -> list[str]:
        return [name for subject in self.subjects for name in subject.names]

    def begin(self) -> None:
        """Sample the entries before a step."""
        locals_ = self._locals()
        # The version tells if anything has written to a weight since the step before, except through .data.
        if self._sample is None or self._versions != _versions(locals_) or self._addresses != _addresses(locals_):
            self._sample = self._take(locals_)

    def compare(self) -> None:
        """Sample the entries after a step."""
        before = self._sample
        assert before is not None
        after = self._sample = self._take(self._locals())
        # If the step has changed the layout of weights, there are no entries to compare.
        self._pairs.append((before if before.shape == after.shape else after, after))
        if after.device.type == "cpu":
            # On the host it is faster to add up now, while the entries are in the cache.
            self._add_up()

    def total(self) -> Tensor:
        """The mean squares of all steps since the last call, flattened and summed over ranks."""
        self._add_up()
        total = torch.cat(self._sums).flatten()
        self._sums.clear()
        if self.team is not None:
            self.team.sum(total, "monitor")
        return total

    def _add_up(self) -> None:
        """Convert copies to mean squares (steps, parts)."""
        if not self._pairs:
            return
        assert self._lengths is not None
        assert self._factors is not None
        count = len(self._pairs)
        before, after = (
            as_float(some[0] if count == 1 else torch.cat(some)) for some in zip(*self._pairs, strict=True)
        )
        moved = functional.mse_loss(after, before, reduction="none")
        sums = torch.segment_reduce(moved, "sum", lengths=self._lengths.repeat(count), unsafe=True)
        self._sums.append(sums.double().view(count, -1) * self._factors)
        self._pairs.clear()

    def _locals(self) -> list[Tensor]:
        # Not detached, since hooks run without gradients.
        if self.team is None:
            return [subject.parameter for subject in self.subjects]
        return [subject.local(subject.parameter) for subject in self.subjects]

    def _take(self, locals_: list[Tensor]) -> Tensor:
        """The sampled entries, concatenated."""
        # Views stay valid while the parameters' addresses do. Interleaved parts are copies, which do not.
        addresses = _addresses(locals_)
        if addresses != self._addresses or self._copies:
            self._look_at(locals_)
        self._addresses, self._versions = addresses, _versions(locals_)
        for index, grid in self._grids:
            self._entries[index] = grid.reshape(-1)
        return torch.cat(self._entries)

    def _look_at(self, locals_: list[Tensor]) -> None:
        self._copies = any(subject.interleaved for subject in self.subjects)
        parts = [part for s, t in zip(self.subjects, locals_, strict=True) for part in s.local_parts(t.detach())]
        self._entries = [sampled(part) for part in parts]
        self._grids = [(index, view) for index, view in enumerate(self._entries) if view.ndim != 1]
        sizes = [(part.numel(), view.numel()) for part, view in zip(parts, self._entries, strict=True)]
        if sizes == self._sizes:
            return
        self._add_up()
        self._sizes = sizes
        wholes = [math.prod(shape) for subject in self.subjects for shape in subject.shapes]
        counted = [subject.counts for subject in self.subjects for _ in subject.names]
        factors = [
            size / max(1, length) / whole if counts else 0.0
            for (size, length), whole, counts in zip(sizes, wholes, counted, strict=True)
        ]
        device = parts[0].device
        self._factors = torch.tensor(factors, dtype=torch.float64, device=device)
        self._lengths = torch.tensor([length for _, length in sizes], device=device)


def _is_on_device(lr: float | Tensor) -> bool:
    return isinstance(lr, Tensor) and lr.device.type != "cpu"


def _addresses(locals_: list[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in locals_]


def _versions(locals_: list[Tensor]) -> list[int]:
    return [tensor._version for tensor in locals_]


def sampled(part: Tensor) -> Tensor:
    """A view of entries that are spread evenly over rows and columns of (..., m, n)."""
    for view in (part, part.mT):
        if view.is_contiguous():
            return view.view(-1)[:: sample_stride(part.numel(), view.shape[-1], SAMPLE)]
    # No single stride reaches all entries, so take every few rows and columns.
    side = max(1, math.isqrt(max(1, part.numel() // SAMPLE)))
    rows, columns = part.shape[-2:]
    return part[..., :: min(rows, side), :: min(columns, side)] if part.numel() else part
