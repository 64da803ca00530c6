"""An estimate of every update's root mean square after every step, from a fixed sample of entries.

A thousand entries of every matrix are copied before the step and compared after it, at a thousandth of a step's cost;
the sums stay on the device until they are read, for many steps in one go. Of a sharded matrix every rank samples what
it holds. Relied on by :class:`~spectrim.monitor.monitor.SpectralMonitor`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spectrim.distributed.collectives import Team
from spectrim.monitor.measurement import as_float
from spectrim.monitor.sketch import sample_stride
from spectrim.monitor.subjects import Subject

__all__ = ["SAMPLE", "Watch"]

#: Entries of each matrix that are compared, at most; the root mean square of so many is good to 2 to 3 %.
SAMPLE = 1024


class Watch:
    """The samples of some subjects.

    Args:
        subjects: what is watched; of plain parameters, only what this process reports.
    """

    def __init__(self, subjects: Sequence[Subject]) -> None:
        places: dict[tuple[Any, ...], _Place] = {}
        for subject in subjects:
            key = (subject.team and subject.team.key, subject.parameter.device)
            places.setdefault(key, _Place(subject.team)).subjects.append(subject)
        self._places = list(places.values())
        self._steps: list[tuple[int, dict[str, float | Tensor]]] = []

    def before(self) -> None:
        """Copy the samples that the step is about to move."""
        for place in self._places:
            place.before = place.sample()

    def after(self, step: int, groups: Sequence[Mapping[str, Any]]) -> None:
        """Compare, after this step was taken at the groups' learning rates."""
        for place in self._places:
            place.compare()
        rates: dict[str, float | Tensor] = {}
        for place in self._places:
            for subject in place.subjects:
                lr = groups[subject.position[0]].get("lr", 1.0)
                rates |= dict.fromkeys(subject.names, lr.detach().clone() if isinstance(lr, Tensor) else float(lr))
        self._steps.append((step, rates))

    def __len__(self) -> int:
        return len(self._steps)

    def tensors(self) -> list[Tensor]:
        """What was found since the last reading, where it is; ranks of shards call this together."""
        return [place.total() for place in self._places] if self._steps else []

    def read(self, tensors: Sequence[Tensor]) -> list[tuple[int, dict[str, dict[str, float]]]]:
        """For every step since the last reading, "update_rms" and "lr" by name.

        Args:
            tensors: :meth:`tensors`, on the host.
        """
        steps, self._steps = self._steps, []
        found: list[tuple[int, dict[str, dict[str, float]]]] = [(step, {}) for step, _ in steps]
        for place, tensor in zip(self._places, tensors, strict=False):
            rows = tensor.view(len(steps), -1).sqrt().tolist()
            for (_, values), (_, rates), row in zip(found, steps, rows, strict=True):
                for name, value in zip(place.names, row, strict=True):
                    values[name] = {"update_rms": value, "lr": float(rates[name])}
        return found


class _Place:
    """The subjects of one team on one device."""

    def __init__(self, team: Team | None) -> None:
        self.team = team
        self.subjects: list[Subject] = []
        self.before: Tensor | None = None
        self.sums: list[Tensor] = []
        self._views: list[Tensor] = []
        self._lengths: Tensor | None = None
        self._factors: Tensor | None = None
        self._addresses: list[int] = []

    @property
    def names(self) -> list[str]:
        return [name for subject in self.subjects for name in subject.names]

    def sample(self) -> Tensor:
        """The entries, all in a row."""
        locals_ = [subject.local(subject.parameter.detach()) for subject in self.subjects]
        # The views stay good as long as the memory that they look at is the parameter's.
        addresses = [tensor.data_ptr() for tensor in locals_]
        if addresses != self._addresses:
            parts = [part for s, t in zip(self.subjects, locals_, strict=True) for part in s.local_parts(t)]
            self._views, self._addresses = [sampled(part) for part in parts], addresses
            device = parts[0].device
            sizes = [math.prod(shape) for subject in self.subjects for shape in subject.shapes]
            counted = [subject.counts for subject in self.subjects for _ in subject.names]
            factors = [
                part.numel() / max(1, view.numel()) / size if counts else 0.0
                for part, view, size, counts in zip(parts, self._views, sizes, counted, strict=True)
            ]
            self._factors = torch.tensor(factors, dtype=torch.float64, device=device)
            self._lengths = torch.tensor([view.numel() for view in self._views], device=device)
        return torch.cat([view.reshape(-1) for view in self._views])

    def compare(self) -> None:
        """Add the mean squares of what moved since the sample was taken."""
        after = self.sample()
        assert self.before is not None
        assert self._lengths is not None
        assert self._factors is not None
        moved = (as_float(after) - as_float(self.before)).square_()
        sums = torch.segment_reduce(moved, "sum", lengths=self._lengths, unsafe=True)
        self.sums.append(sums.double() * self._factors)
        self.before = None

    def total(self) -> Tensor:
        """The mean squares of all steps since the last call, in a row, of what all ranks hold."""
        total = torch.stack(self.sums).flatten()
        self.sums.clear()
        if self.team is not None:
            self.team.sum(total, "monitor")
        return total


def sampled(part: Tensor) -> Tensor:
    """A view of entries that lie evenly over the rows and columns of (..., m, n)."""
    for view in (part, part.mT):
        if view.is_contiguous():
            return view.view(-1)[:: sample_stride(part.numel(), view.shape[-1], SAMPLE)]
    # A grid, for entries that no single stride reaches.
    side = max(1, math.isqrt(max(1, part.numel() // SAMPLE)))
    rows, columns = part.shape[-2:]
    return part[..., :: min(rows, side), :: min(columns, side)] if part.numel() else part
