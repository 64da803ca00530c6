"""Progress on the terminal: a bar for all steps with the time left, and the loss as it is.

Where there is no terminal (a file, a CI log), a plain line a run says the same.
"""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from spectrim.lab.config import TrainConfig
from spectrim.lab.log import Record
from spectrim.lab.results import RunResult

__all__ = ["TerminalMonitor"]


class TerminalMonitor:
    """Shows a comparison, or a single run, while it goes; a context manager. Everything goes to stderr."""

    def __init__(self, runs: int, steps: int) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}", markup=False),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._runs = runs
        self._steps = steps
        self._done = 0
        self._validation = ""
        self._announce = ""
        self._task = self._bar.add_task("preparing", total=runs * steps, loss="")

    def calibration_started(self, config: TrainConfig) -> None:
        """Name the recipe that is being timed at the bar's left."""
        self._bar.update(self._task, description=f"timing {config.recipe}")
        if not self._console.is_terminal:
            self._console.print(f"timing {config.recipe}", markup=False, highlight=False)

    def run_started(self, config: TrainConfig) -> None:
        """Name the run at the bar's left."""
        self._validation = ""
        run = f"{config.recipe}, seed {config.seed} ({self._done + 1} of {self._runs})"
        self._bar.update(self._task, description=run)
        self._announce = f"{run}: {config.steps} steps"

    def step(self, record: Record) -> None:
        """Move the bar and show the losses."""
        # Not before the first step: until then the input may be refused, and the refusal is all there is to read.
        if self._announce and not self._console.is_terminal:
            self._console.print(self._announce, markup=False, highlight=False)
        self._announce = ""
        if "val_loss" in record:
            self._validation = f"  validation {record['val_loss']:.3f}"
        done = self._done * self._steps + record["step"]
        self._bar.update(self._task, completed=done, loss=f"loss {record['loss']:.3f}{self._validation}")

    def run_finished(self, config: TrainConfig, result: RunResult) -> None:
        """Leave one line of the run above the bar."""
        self._done += 1
        self._bar.update(self._task, completed=self._done * self._steps)
        loss = "diverged" if result.final_loss is None else f"final loss {result.final_loss:.4f}"
        line = f"{config.recipe}, seed {config.seed}: {loss}, {result.step_ms:.0f} ms a step"
        self._console.print(line, markup=False, highlight=False)

    def __enter__(self) -> "TerminalMonitor":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
