"""How many steps each parameter skipped because its gradient was not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from spectrim.monitor.board import Found, on_host
from spectrim.optim.entries import parameter_name
from spectrim.optim.optimizer import SpectralOptimizer
from spectrim.optim.wrapping.wrapper import SpectralClipping

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
        self.names: dict[tuple[int, int], str] = {}
        """Of parameters by their place in the groups."""
        self._before: dict[str, int] = {}
        self._seen: dict[str, int] = {}
        self.total = 0
        """The sum of all, as of the last measurement."""

    def tensors(self) -> list[Tensor]:
        """What an optimizer of this library has counted on its device."""
        held = [count for count in self._own().values() if isinstance(count, Tensor)]
        return [torch.stack(held)] if held else []

    def counts(self, found: Sequence[Found] = (), tensors: Sequence[Tensor] | None = None) -> dict[str, int]:
        """The counts so far.

        Args:
            found: by a measurement.
            tensors: :meth:`tensors` on the host, where they are there already.
        """
        own = self._own()
        host = on_host(self.tensors()) if tensors is None else tensors
        numbers = iter([number for tensor in host for number in tensor.tolist()])
        if _counts(self._optimizer):
            self._seen = {
                self._name(position): int(next(numbers) if isinstance(count, Tensor) else count)
                for position, count in own.items()
            }
        else:
            unfit = {part.subject.name for part in found if _is_unfit(part)}
            self._seen |= {name: self._seen.get(name, 0) + 1 for name in unfit}
        counts = {
            name: self._before.get(name, 0) + self._seen.get(name, 0)
            for name in self._before.keys() | self._seen.keys()
        }
        self.total = sum(counts.values())
        return counts

    def _own(self) -> Mapping[tuple[int, int], int | Tensor]:
        counts: Mapping[tuple[int, int], int | Tensor] = getattr(self._optimizer, "_skipped", {})
        return counts

    def _name(self, position: tuple[int, int]) -> str:
        return self.names.get(position) or parameter_name(self._optimizer.param_groups, position)

    def state_dict(self) -> dict[str, int]:
        """The counts so far, as plain values."""
        return self.counts()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Count on from these."""
        self._before = dict(state)
        self._seen = {}
        self.total = sum(state.values())


def _counts(optimizer: Optimizer) -> bool:
    """Whether an optimizer counts skipped steps itself."""
    return isinstance(optimizer, SpectralOptimizer | SpectralClipping)


def _is_unfit(part: Found) -> bool:
    numbers = part.numbers.get("gradient")
    seen = [] if numbers is None else [float(numbers[:, 0].sum())]
    return not all(map(math.isfinite, seen if part.before is None else [*seen, part.before]))
