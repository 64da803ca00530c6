"""How many steps each parameter skipped because its gradient was not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from spectrim.monitor.measurement import Found
from spectrim.optim.entries import parameter_name

__all__ = ["Skips"]


class Skips:
    """Counts by the name of the parameter.

    Optimizers of this library count every step themselves. Of others, which do not skip, the gradients that are not
    finite are counted on measured steps.

    Args:
        optimizer: whose steps they are.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._before: dict[str, int] = {}
        self._seen: dict[str, int] = {}
        self.total = 0
        """The sum of all, as of the last measurement."""

    def counts(self, found: Sequence[Found]) -> dict[str, int]:
        """The counts so far, after a measurement."""
        own = getattr(self._optimizer, "_skipped", None)
        if own is None:
            unfit = {part.subject.name for part in found if _is_unfit(part)}
            self._seen |= {name: self._seen.get(name, 0) + 1 for name in unfit}
        else:
            names = {part.subject.position: part.subject.name for part in found}
            self._seen = {
                names.get(position) or parameter_name(self._optimizer.param_groups, position): count
                for position, count in _read(own).items()
            }
        names_of_all = self._before.keys() | self._seen.keys()
        counts = {name: self._before.get(name, 0) + self._seen.get(name, 0) for name in names_of_all}
        self.total = sum(counts.values())
        return counts

    def state_dict(self) -> dict[str, int]:
        """The counts so far, as plain values."""
        return self.counts(())

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Count on from these."""
        self._before = dict(state)
        self._seen = {}
        self.total = sum(state.values())


def _read(counts: Mapping[tuple[int, int], int | Tensor]) -> dict[tuple[int, int], int]:
    """The counts that an optimizer keeps by position, those on a device in one read."""
    tensors = {position: count for position, count in counts.items() if isinstance(count, Tensor)}
    read = dict(zip(tensors, torch.stack(list(tensors.values())).tolist() if tensors else [], strict=True))
    return {position: int(read.get(position, count)) for position, count in counts.items()}


def _is_unfit(part: Found) -> bool:
    numbers = part.numbers.get("gradient")
    seen = [] if numbers is None else [float(numbers[:, 0].sum())]
    return not all(map(math.isfinite, seen if part.before is None else [*seen, part.before]))
