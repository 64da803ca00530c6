"""Counts, for each parameter, the steps that were skipped because its gradient was not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from spectrim.monitor.buffer import PartMeasurement
from spectrim.optim.stepping.entries import parameter_name

__all__ = ["SkipCounts"]


class SkipCounts:
    """Counts by parameter name.

    They come from the optimizer's ``state[parameter]["skipped"]`` or ``skipped_steps()``. For an optimizer without
    either, gradients that are not finite are counted on measured steps.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer: Any = optimizer
        self.names: dict[tuple[int, int], str] = {}
        """Position in the groups -> parameter name."""
        self._before: dict[str, int] = {}
        self._counted_before: dict[str, int] = {}
        self._seen: dict[str, int] = {}
        self.total = 0
        """The sum of all counts at the last measurement."""

    def tensors(self) -> list[Tensor]:
        """The counts in the optimizer's state, one tensor for each device."""
        held = list(self._in_state().values())
        devices = dict.fromkeys(tensor.device for tensor in held)
        return [torch.stack([tensor for tensor in held if tensor.device == device]) for device in devices]

    def counts(self, found: Sequence[PartMeasurement] = (), hosts: Sequence[Tensor] | None = None) -> dict[str, int]:
        """The counts so far.

        Args:
            found: the parts of a measurement.
            hosts: the :meth:`tensors`, if they were copied to the host already.
        """
        if held := self._in_state():
            tensors = self.tensors() if hosts is None else hosts
            numbers = iter([int(number) for tensor in tensors for number in tensor.tolist()])
            devices = dict.fromkeys(tensor.device for tensor in held.values())
            # The optimizer's state dict restores these counts.
            counts = {name: next(numbers) for device in devices for name, t in held.items() if t.device == device}
        else:
            if callable(getattr(self._optimizer, "skipped_steps", None)):
                self._seen = self._asked()
            else:
                unfit = {part.subject.name for part in found if _is_unfit(part)}
                self._seen |= {name: self._seen.get(name, 0) + 1 for name in unfit}
            counts = {
                name: self._before.get(name, 0) + self._seen.get(name, 0) - self._counted_before.get(name, 0)
                for name in self._before.keys() | self._seen.keys()
            }
        self.total = sum(counts.values())
        return counts

    def state_dict(self) -> dict[str, int]:
        """The counts so far."""
        return self.counts()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from a :meth:`state_dict`."""
        self._before, self._seen = dict(state), {}
        # The optimizer's own counts may or may not have been restored with its state.
        self._counted_before = self._asked() if callable(getattr(self._optimizer, "skipped_steps", None)) else {}
        self.total = sum(state.values())

    def _places(self) -> dict[tuple[int, int], Tensor]:
        groups = self._optimizer.param_groups
        return {(g, i): p for g, group in enumerate(groups) for i, p in enumerate(group["params"])}

    def _in_state(self) -> dict[str, Tensor]:
        """The counts in the optimizer's state, by name."""
        found = {}
        for position, parameter in self._places().items():
            # The state is a defaultdict, in which state[parameter] would create an entry.
            count = self._optimizer.state.get(parameter, {}).get("skipped")
            if isinstance(count, Tensor):
                found[self._name(position)] = count.detach().reshape(())
        return found

    def _asked(self) -> dict[str, int]:
        """The result of the optimizer's ``skipped_steps()``, by the monitor's names."""
        groups = self._optimizer.param_groups
        own = {parameter_name(groups, position): self._name(position) for position in self._places()}
        return {own.get(name, name): int(count) for name, count in self._optimizer.skipped_steps().items()}

    def _name(self, position: tuple[int, int]) -> str:
        return self.names.get(position) or parameter_name(self._optimizer.param_groups, position)


def _is_unfit(part: PartMeasurement) -> bool:
    seen = sum(part.readings["gradient"]["energy"]) if "gradient" in part.readings else 0.0
    return not all(map(math.isfinite, (seen, 0.0 if part.before is None else part.before)))
