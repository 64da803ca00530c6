"""The monitor of a run, whose time is measured apart from the step's. The table ``monitor`` of the configuration
decides what it measures. Records go to ``monitor.jsonl``, which is truncated to the checkpoint that a run resumes from,
and to a callback. Relied on by :mod:`spectrim.lab.training.loop`.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

__all__ = ["OnMeasure", "RunMonitor", "exact_patterns", "monitor_run"]

OnMeasure = Callable[[MonitorRecord], None]

# The lab shows warnings from the records itself.
logging.getLogger("spectrim.monitor").addHandler(logging.NullHandler())


@contextmanager
def monitor_run(
    config: TrainConfig,
    model: nn.Module,
    optimizer: Optimizer,
    clock: Clock,
    *,
    start: int,
    state: Mapping[str, Any] | None,
    file: Path | None,
    tell: Sequence[OnMeasure] = (),
) -> Iterator["RunMonitor | None"]:
    """A monitor on a run from ``start`` steps on, or None where the configuration turns it off.

    Args:
        config: of the run.
        model: this rank's part of it; every rank has a monitor.
        optimizer: over its parameters.
        clock: the monitor's time becomes its share "monitor_ms".
        start: steps taken before.
        state: of the monitor, where the checkpoint has it.
        file: of the records; on rank 0 alone.
        tell: called with every record, on rank 0.

    Raises:
        LabError: a layer is not there, or the file holds something else.
    """
    if config.measured_every == 0:
        yield None
        return
    records = None
    if file is not None:
        try:
            records = JsonLines(file, resume_step=start)
        except ValueError as error:
            raise LabError(str(error)) from None
    run_monitor = RunMonitor(config, model, optimizer, clock, start=start, records=records, tell=tell)
    if state is not None:
        run_monitor.monitor.load_state_dict(state)
    with run_monitor.monitor:
        yield run_monitor


class RunMonitor:
    """Runs a :class:`spectrim.SpectralMonitor`, takes its time, and receives its records."""

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        optimizer: Optimizer,
        clock: Clock,
        *,
        start: int,
        records: JsonLines | None,
        tell: Sequence[OnMeasure],
    ) -> None:
        self._clock, self._records, self._tell = clock, records, tell
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

    def __call__(self, record: Record) -> None:
        """Take a record of the monitor.

        Raises:
            OSError: the disk is full, say. The file then ends with the record before.
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
    """Patterns of the names of all matrices in the layers that are measured exactly; of all matrices if the model has
    no layers.

    Raises:
        LabError: a layer that is named is not there.
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
