"""The log of a run: one JSON object a step in ``log.jsonl``, and the same numbers as TensorBoard event files.

A resumed run first truncates its log to its checkpoint, so that no step is missing or repeated. The log is forced to
disk before each checkpoint. A record is written whole or, on a full disk, not at all.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from spectrim.lab.config import TrainConfig
from spectrim.lab.errors import LabError
from spectrim.lab.files import finite, naming, parse_json, read_lines
from spectrim.lab.logging.event_files import EventFile
from spectrim.lab.logging.monitor_log import MonitorRecord
from spectrim.lab.logging.tensorboard import describe, measured_scalars

__all__ = ["RunLog", "StepRecord", "read_log"]


class StepRecord(TypedDict):
    """The record of a step. A loss that is not finite is null in the file."""

    step: int
    """Updates made so far, from 1."""
    tokens: int
    loss: float
    """Mean over the batch, before the update."""
    lr: float
    grad_norm: float
    """Before the global clip."""
    forward_backward_ms: float
    optimizer_ms: float
    rest_ms: float
    """The remaining time: waiting for the batch, and the learning rate."""
    gradient_clip_ms: float
    """The global norm of the gradient, and its clip."""
    logging_ms: NotRequired[float]
    """Time to log and show the step before."""
    val_loss: NotRequired[float]
    """After the update, where evaluated."""
    val_loss_by_frequency: NotRequired[dict[str, float | None]]
    """The same by frequency of the target in the training text, see :mod:`spectrim.lab.training.evaluate`."""
    evaluation_ms: NotRequired[float]
    monitor_ms: NotRequired[float]
    """Time of the run's monitor."""
    checkpoint_ms: NotRequired[float]
    """Time of the checkpoint after the step before."""


class RunLog:
    """Writes the records of one run; a context manager."""

    def __init__(self, path: Path, *, resume_step: int, config: TrainConfig | None = None) -> None:
        """Open the log after ``resume_step`` steps, dropping whatever came later.

        With the run's configuration, TensorBoard shows that too.

        Raises:
            LabError: the log that is there ends before that step.
        """
        self._path = path
        path.touch()
        truncate(path, resume_step)
        # Unbuffered, so that closing does not retry a failed write.
        self._file = path.open("ab", buffering=0)
        self._events = EventFile(path.parent, purge_step=resume_step + 1)
        if config is not None:
            describe(self._events, config)

    def write(self, record: StepRecord) -> None:
        """Append a record; a reader sees it at once.

        Raises:
            OSError: the disk is full, say. The log then ends with the record before.
        """
        line = json.dumps(finite(dict(record)), allow_nan=False).encode() + b"\n"
        end = os.fstat(self._file.fileno()).st_size
        with naming(self._path):
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[self._file.write(rest) :]
            except BaseException:
                os.ftruncate(self._file.fileno(), end)
                raise
        self._events.add(scalars(record), record["step"])

    def write_measurement(self, record: MonitorRecord) -> None:
        """Add what a monitor measured to the event file alone: ``monitor.jsonl`` is the monitor's."""
        self._events.add(measured_scalars(record), record["step"])
        for alarm in record.get("alarms", ()):
            self._events.add_text("alarms", alarm["message"], record["step"])

    def sync(self) -> None:
        """Force what has been written to disk."""
        with naming(self._path):
            os.fsync(self._file.fileno())
            self._events.flush()

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        self._events.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Do not hide the error that ends the run behind the same one from the event file.
        with suppress(*([OSError] if kind else [])):
            self.close()


SCALARS = {
    "loss": "loss/train",
    "val_loss": "loss/validation",
    "lr": "schedule/lr",
    "grad_norm": "gradient/norm",
    "forward_backward_ms": "time/forward_backward_ms",
    "optimizer_ms": "time/optimizer_ms",
    "logging_ms": "time/logging_ms",
    "monitor_ms": "time/monitor_ms",
}
"""Keys that go to TensorBoard, and their tags."""


def scalars(record: StepRecord) -> dict[str, float]:
    """The numbers of a record by their tags in TensorBoard."""
    named: dict[str, float] = {tag: record[key] for key, tag in SCALARS.items() if key in record}  # type: ignore[literal-required]
    by_frequency = record.get("val_loss_by_frequency", {}).items()
    return named | {f"loss_by_frequency/{ranks}": loss for ranks, loss in by_frequency if loss is not None}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The complete records of a log; a last line that a crash cut short is left out."""
    return read_lines(path)


def json_step(line: bytes, place: str) -> Any:
    record = parse_json(line, place)
    return record.get("step") if isinstance(record, dict) else None


def truncate(path: Path, step: int) -> None:
    """Keep the first ``step`` records, which are steps 1 to ``step``."""
    lines = path.read_bytes().split(b"\n")[:-1][:step]
    steps = [json_step(line, f"log {str(path)!r}") for line in lines]
    if steps != list(range(1, step + 1)):
        raise LabError(f"log {str(path)!r} does not hold steps 1 to {step}, which its checkpoint is after")
    os.truncate(path, sum(len(line) + 1 for line in lines))
