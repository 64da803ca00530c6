"""The log of a run: one JSON object a step in ``log.jsonl``, and the same numbers as TensorBoard event files.

A resumed run first cuts its log back to the checkpoint it goes on from, so that the log has neither duplicates nor
holes. The log is forced to disk before each checkpoint, so that it is never behind one.
"""

import json
import os
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from spectrim.lab.errors import LabError
from spectrim.lab.files import finite

__all__ = ["Record", "RunLog", "read_log"]


class Record(TypedDict):
    """What is logged after a step. A loss that is not finite is null in the file."""

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
    """Batch, clip, schedule, logging of the step before: what is neither of the two above nor below."""
    val_loss: NotRequired[float]
    """After the update, where evaluated."""
    evaluation_ms: NotRequired[float]
    checkpoint_ms: NotRequired[float]
    """What the checkpoint after the step before took."""


class RunLog:
    """Writes the records of one run; a context manager."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        """Open the log after ``resume_step`` steps, dropping whatever came later.

        Raises:
            LabError: the log that is there ends before that step.
        """
        from torch.utils.tensorboard import SummaryWriter

        path.touch()
        truncate(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(path.parent), purge_step=resume_step + 1)

    def write(self, record: Record) -> None:
        """Append a record; a reader sees it at once."""
        self._file.write(json.dumps(finite(dict(record)), allow_nan=False) + "\n")
        self._file.flush()
        for key, tag in SCALARS.items():
            if key in record:
                self._board.add_scalar(tag, record[key], record["step"])  # type: ignore[literal-required]

    def sync(self) -> None:
        """Force what has been written to disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        self._board.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


SCALARS = {
    "loss": "loss/train",
    "val_loss": "loss/validation",
    "lr": "schedule/lr",
    "grad_norm": "gradient/norm",
    "forward_backward_ms": "time/forward_backward_ms",
    "optimizer_ms": "time/optimizer_ms",
}
"""What goes to TensorBoard, and its tag there."""


def read_log(path: Path) -> list[dict[str, Any]]:
    """Every complete record of a log; a last line cut short by a crash is not one."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def truncate(path: Path, step: int) -> None:
    """Keep the first ``step`` records, which are steps 1 to ``step``."""
    lines = path.read_bytes().split(b"\n")[:-1][:step]
    if len(lines) < step or any(json.loads(line)["step"] != index for index, line in enumerate(lines, start=1)):
        raise LabError(f"log {str(path)!r} does not hold steps 1 to {step}, which its checkpoint is after")
    os.truncate(path, sum(len(line) + 1 for line in lines))
