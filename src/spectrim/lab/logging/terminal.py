"""Progress on the terminal: a bar for all steps with the time left, and below it loss, speed and the most active layer.
In a file or a CI log there is a plain line for each run and each warning.
"""

from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from spectrim.lab.config import TrainConfig
from spectrim.lab.logging.dynamics import step_seconds
from spectrim.lab.logging.log import StepRecord
from spectrim.lab.logging.monitor_log import MonitorRecord, short_names
from spectrim.lab.logging.run_result import RunResult

__all__ = ["SpectrumProgress", "TerminalProgress", "loudest", "warning"]

SPEED_OVER = 20
"""Steps whose median time is shown as speed."""


class OnStderr:
    """A bar on stderr if that is a terminal; a context manager."""

    def __init__(self, *columns: ProgressColumn) -> None:
        self._console = Console(stderr=True)
        self._bar = BarOverLines(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            *columns,
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )

    def say_in_a_file(self, line: str) -> None:
        """Print a line where there is no terminal for the bar."""
        if not self._console.is_terminal:
            self._console.print(line, markup=False, highlight=False)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


class SpectrumProgress(OnStderr):
    """Shows the progress of ``spectrim spectrum``."""

    def __init__(self) -> None:
        super().__init__(TimeElapsedColumn())
        self._task = self._bar.add_task("reading", total=None)

    def say(self, what: str) -> None:
        """Name the current work."""
        self._bar.update(self._task, description=what)

    def subject_started(self, name: str, batches: int, matrices: int) -> None:
        """Begin a bar of gradients and matrices."""
        self._bar.reset(self._task, total=batches + 4 * matrices, description=f"{name}: gradients")
        self.say_in_a_file(f"{name}: {batches} batches, {matrices} matrices")

    def batch_done(self) -> None:
        """Move the bar by one batch."""
        self._bar.advance(self._task)

    def matrix_done(self) -> None:
        """Move the bar by one matrix, which takes about as long as four batches of a small model."""
        self._bar.advance(self._task, 4)


class TerminalProgress(OnStderr):
    """Shows the progress of a comparison or of a single run."""

    def __init__(self, runs: int, steps: int) -> None:
        super().__init__(MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._runs = runs
        self._steps = steps
        self._done = 0
        self._validation = ""
        self._announce = ""
        self._seconds: deque[float] = deque(maxlen=SPEED_OVER)
        self._task = self._bar.add_task("preparing", total=runs * steps)

    def calibration_started(self, config: TrainConfig) -> None:
        """Name the recipe that is being timed at the bar's left."""
        self._bar.update(self._task, description=f"timing {config.recipe}")
        self.say_in_a_file(f"timing {config.recipe}")

    def run_started(self, config: TrainConfig) -> None:
        """Name the run at the bar's left."""
        self._validation = ""
        self._seconds.clear()
        self._bar.status = self._bar.loudest = ""
        run = f"{config.recipe}, seed {config.seed} ({self._done + 1} of {self._runs})"
        self._bar.update(self._task, description=run)
        self._announce = f"{run}: {config.steps} steps"

    def step(self, record: StepRecord) -> None:
        """Move the bar and show the losses."""
        # Announce a run at its first step, since its input may be refused before.
        if self._announce:
            self.say_in_a_file(self._announce)
        self._announce = ""
        if "val_loss" in record:
            self._validation = f" · validation {record['val_loss']:.3f}"
        self._seconds.append(step_seconds(dict(record)))
        speed = record["tokens"] / record["step"] / (median(self._seconds) or float("inf"))
        self._bar.status = f"loss {record['loss']:.3f}{self._validation} · {speed:,.0f} tokens/s"
        self._bar.update(self._task, completed=self._done * self._steps + record["step"])

    def measured(self, record: MonitorRecord) -> None:
        """Show the loudest layer, and leave one line above the bar where there is something to warn of."""
        if line := warning(record):
            # On a terminal the line is cut at its width; a file keeps all of it.
            terminal = self._console.is_terminal
            text = Text(line, style="yellow", overflow="ellipsis" if terminal else "ignore", no_wrap=True)
            self._console.print(text, soft_wrap=not terminal)
        if line := loudest(record):
            self._bar.loudest = line

    def run_finished(self, config: TrainConfig, result: RunResult) -> None:
        """Leave one line of the run above the bar."""
        self._done += 1
        self._bar.update(self._task, completed=self._done * self._steps)
        loss = "diverged" if result.final_loss is None else f"final loss {result.final_loss:.4f}"
        line = f"{config.recipe}, seed {config.seed}: {loss}, {result.step_ms:.0f} ms a step"
        self._console.print(line, markup=False, highlight=False)


class BarOverLines(Progress):
    """A bar with two lines of text below it."""

    status = loudest = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, then the lines; what does not fit into the terminal is cut off."""
        yield from super().get_renderables()
        for line in filter(None, (self.status, self.loudest)):
            yield Text(line, overflow="ellipsis", no_wrap=True)


def loudest(record: MonitorRecord) -> str:
    """The matrix of an alarm, or else the one with the largest relative update; empty if there is neither."""
    alarms = record.get("alarms", [])
    names = short_names([*record["parameters"], *(alarm["parameter"] for alarm in alarms)])
    if alarms:
        return f"loudest: {names[loud(alarms)['parameter']]} (warned of at step {record['step']:,})"
    moved = {name: values.get("update_to_weight") for name, values in record["parameters"].items()}
    known = {name: ratio for name, ratio in moved.items() if ratio is not None}
    if not known:
        return ""
    name = max(known, key=known.__getitem__)
    return f"loudest: {names[name]} (a step is {known[name]:.2%} of its norm)"


def warning(record: MonitorRecord) -> str:
    """The alarms of a record in one line; empty where there are none."""
    if not (alarms := record.get("alarms", [])):
        return ""
    alarm = loud(alarms)
    name = short_names([alarm["parameter"]])[alarm["parameter"]]
    text = alarm["message"].replace(alarm["parameter"], name) if alarm["parameter"] else alarm["message"]
    return f"{text}; {len(alarms) - 1} more" if len(alarms) > 1 else text


def loud(alarms: list[MonitorRecord]) -> MonitorRecord:
    """The alarm farthest from its trend, counting one that is not finite as infinitely far."""
    return max(alarms, key=lambda alarm: float("inf") if alarm["deviations"] is None else alarm["deviations"])
