"""The monitor of a run; its time is measured apart from the step's. The table ``monitor`` of the configuration decides
what it measures. Records go to callbacks and to ``monitor.jsonl``, which a resumed run truncates to its checkpoint.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer

from spectrim.lab.config import MonitorConfig, TrainConfig
from spectrim.lab.errors import LabError
from spectrim.lab.files import naming
from spectrim.lab.logging.monitor_log import MonitorRecord
from spectrim.lab.training.clock import Clock
from spectrim.lab.training.evaluate import evaluation_steps
from spectrim.monitor import JsonLines, Record, SpectralMonitor

__all__ = ["OnMeasure", "RunMonitor", "exact_patterns"]

OnMeasure = Callable[[MonitorRecord], None]

# The lab shows warnings from the records itself.
logging.getLogger("spectrim.monitor").addHandler(logging.NullHandler())


class RunMonitor:
    """Runs a :class:`spectrim.SpectralMonitor` on every rank, from ``start`` steps and the ``state`` in a checkpoint.

    Its time becomes the clock's share "monitor_ms". Records go to ``file`` and to the functions in ``tell``, both on
    rank 0 alone.

    Raises:
        LabError: a layer does not exist, or the file holds something else.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        optimizer: Optimizer,
        clock: Clock,
        *,
        start: int,
        state: Mapping[str, Any] | None = None,
        file: Path | None = None,
        tell: Sequence[OnMeasure] = (),
    ) -> None:
        try:
            self._records = JsonLines(file, resume_step=start) if file is not None else None
        except ValueError as error:
            raise LabError(str(error)) from None
        self._clock, self._tell = clock, tell
        self._known_ms = 0.0
        times = config.monitor.exact_times
        # Hooks run in the order in which they were added, so the monitor's lie between those that read the clock.
        optimizer.register_step_pre_hook(self._end_of_step)
        optimizer.register_step_post_hook(self._end_of_step)
        self.monitor = SpectralMonitor(
            model,
            optimizer,
            config.measured_every,
            out=self,
            exact_steps=evaluation_steps(config.steps, times) if times else (),
            exact=exact_patterns(model, config.monitor),
            steps_taken=start,
        )
        optimizer.register_step_pre_hook(self._end_of_monitor)
        optimizer.register_step_post_hook(self._end_of_monitor)
        if state is not None:
            self.monitor.load_state_dict(state)

    def __call__(self, record: Record) -> None:
        """Take a record of the monitor.

        Raises:
            OSError: a write failed, as on a full disk. The file then ends with the record before.
        """
        if self._records is not None:
            self._records(record)
        for tell in self._tell:
            tell(cast(MonitorRecord, record))

    def state_dict(self) -> dict[str, Any]:
        """The monitor's state for a checkpoint; its records so far are then on disk. All ranks take part."""
        state = self.monitor.state_dict()
        if self._records is not None:
            with naming(self._records.path):
                self._records.sync()
        return state

    def close(self) -> None:
        """Close the file; the monitor calls this as it is closed."""
        if self._records is not None:
            self._records.close()

    def _end_of_step(self, *_: Any) -> None:
        self._clock.lap("optimizer_ms")
        # Time since the last reading was spent while gradients were accumulated.
        self._clock.move("forward_backward_ms", "monitor_ms", self.monitor.milliseconds - self._known_ms)

    def _end_of_monitor(self, *_: Any) -> None:
        self._clock.lap("monitor_ms")
        self._known_ms = self.monitor.milliseconds


def exact_patterns(model: nn.Module, config: MonitorConfig) -> list[str]:
    """Name patterns of the matrices to measure exactly: those of the chosen layers, or all if the model has no layers.

    Raises:
        LabError: a chosen layer does not exist.
    """
    layers: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and (match := re.match(r"(?:[^.]+\.)*?(\d+)\.", name)):
            layers.setdefault(int(match[1]), set()).add(f"{match[0]}*")
    found = sorted(layers)
    if config.layers is None:
        wanted = {found[0], found[len(found) // 2], found[-1]} if found else set()
    else:
        wanted = set(config.layers)
    if foreign := sorted(wanted - layers.keys()):
        there = f"from {found[0]} to {found[-1]}" if found else "none"
        raise LabError(f"monitor.layers has {foreign[0]}, but the model's layers with matrices are {there}")
    return sorted(pattern for layer in wanted for pattern in layers[layer]) or ["*"]
