"""Completes the record of every step when its loss and gradient norm are on the host.

On a CPU that is at once. On a GPU the numbers of :data:`READ_EVERY` steps are copied together, and no step waits for
them; :meth:`StepRecorder.flush` waits for all.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spectrim.lab.logging.log import StepRecord
from spectrim.lab.training.clock import Laps
from spectrim.lab.training.processes import ONE_PROCESS, Parallel
from spectrim.monitor.fetch import Fetch

__all__ = ["READ_EVERY", "StepRecorder"]

READ_EVERY = {"cpu": 1, "cuda": 10}
"""Steps whose numbers are read together, by the type of the device."""

Step = tuple[dict[str, Any], Laps]


class StepRecorder:
    """Completes records and passes them on in the order of steps.

    Args:
        device: where losses are.
        listeners: called with every complete record, in this order.
        parallel: this process among others, all of which add and flush at the same steps; the loss is their mean.
    """

    def __init__(
        self,
        device: torch.device,
        listeners: Sequence[Callable[[StepRecord], None]],
        *,
        parallel: Parallel = ONE_PROCESS,
    ) -> None:
        self._listeners, self._parallel = listeners, parallel
        self._every = READ_EVERY.get(device.type, 1)
        self._open: list[Step] = []
        self._numbers: list[Tensor] = []
        self._under_way: tuple[list[Step], Fetch] | None = None

    def add(self, record: dict[str, Any], laps: Laps, *, loss: Tensor, norm: Tensor) -> None:
        """Add the known values of a step, in the order of the log; its loss, gradient norm and times follow."""
        self._open.append((record, laps))
        self._numbers += [loss, norm.to(loss)]
        if self._every == 1:
            self.flush()
        elif len(self._open) >= self._every:
            # A copy that began this many steps ago has arrived.
            self._finish()
            self._begin()
        elif self._parallel.ranks == 1 and self._under_way is not None and self._under_way[1].ready():
            self._finish()

    def flush(self) -> None:
        """Complete the records of all steps so far."""
        self._finish()
        self._begin()
        self._finish()

    def _begin(self) -> None:
        if self._open:
            self._under_way = self._open, Fetch([torch.stack(self._numbers)])
            self._open, self._numbers = [], []

    def _finish(self) -> None:
        if self._under_way is None:
            return
        steps, fetch = self._under_way
        self._under_way = None
        numbers = fetch.read()[0].tolist()
        losses = self._parallel.means(numbers[0::2])
        for (record, laps), loss, norm in zip(steps, losses, numbers[1::2], strict=True):
            complete: Any = {**record, "loss": loss, "grad_norm": norm, **laps.milliseconds()}
            for listener in self._listeners:
                listener(complete)
