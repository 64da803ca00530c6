"""Sinks for records: files, functions, TensorBoard, Weights & Biases. A sink is a callable with a method ``close``.

TensorBoard and Weights & Biases are imported only when their sinks are made.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, cast

from spectrim.monitor.record import Record

__all__ = ["Callback", "JsonLines", "Out", "Sink", "TensorBoard", "WeightsAndBiases", "scalars", "sinks_of"]


class Sink(Protocol):
    """Takes the records of one run, in the order of their steps."""

    def __call__(self, record: Record) -> None:
        """Write a record."""

    def close(self) -> None:
        """Flush and close. Further calls do nothing."""


#: The argument ``out`` of a monitor: a path of JSON lines, a function of a record, or a sink.
Out = str | os.PathLike[str] | Sink | Callable[[Record], object]


def sinks_of(out: Out | Iterable[Out] | None, *, resume_step: int | None = None) -> list[Sink]:
    """The sinks for a monitor's ``out``. With ``resume_step``, files are continued after that step.

    Raises:
        TypeError: an item is neither a path nor callable.
    """
    if out is None:
        return []
    if isinstance(out, str | os.PathLike):
        return [JsonLines(out, resume_step=resume_step)]
    if callable(out):
        return [cast(Sink, out) if callable(getattr(out, "close", None)) else Callback(out)]
    if not isinstance(out, Iterable):
        raise TypeError(f"out={out!r}: expected a path, a function of a record, a sink, several of these, or None")
    return [sink for one in out for sink in sinks_of(one, resume_step=resume_step)]


class Callback:
    """Passes every record to a function."""

    def __init__(self, function: Callable[[Record], object]) -> None:
        self._function = function

    def __call__(self, record: Record) -> None:
        """Call the function."""
        self._function(record)

    def close(self) -> None:
        """Do nothing."""


class JsonLines:
    """Appends every record to a file as one line of JSON. A line is written completely or not at all.

    Args:
        path: path of the file. Missing folders are made.
        resume_step: continue an existing file, and delete its records of later steps. Without it, an existing file must
            be empty.

    Raises:
        FileExistsError: the file has records, and ``resume_step`` was not given.
        ValueError: the existing file is not a file of records.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int | None = None) -> None:
        self.path = Path(path)
        if resume_step is not None and resume_step < 0:
            raise ValueError(f"resume_step={resume_step}: expected the number of steps taken, at least 0")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size:
            if resume_step is None:
                raise FileExistsError(
                    f"{str(self.path)!r} holds records already: give another path, or "
                    f"JsonLines({str(self.path)!r}, resume_step=...) to continue it"
                )
            os.truncate(self.path, kept_bytes(self.path, resume_step))
        # Unbuffered, so that close does not retry a failed write.
        self._file = self.path.open("ab", buffering=0)

    def __call__(self, record: Record) -> None:
        """Append a line.

        Raises:
            OSError: writing failed, for example on a full disk. The file then ends with the record before.
        """
        line = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        end = os.fstat(self._file.fileno()).st_size
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
        except BaseException as error:
            os.ftruncate(self._file.fileno(), end)
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(self.path)
            raise

    def sync(self) -> None:
        """Force written records to disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Writes every number as a scalar, tagged layer/matrix/quantity so that layers are grouped.

    Args:
        folder: folder of the event files.
        resume_step: TensorBoard ignores records of later steps in earlier files of the folder.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], *, resume_step: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("the TensorBoard sink needs tensorboard: pip install tensorboard") from error
        purge = None if resume_step is None else resume_step + 1
        self._writer: Any = cast(Any, SummaryWriter)(os.fspath(folder), purge_step=purge)

    def __call__(self, record: Record) -> None:
        """Add the numbers of a record as scalars, and its alerts as text."""
        for tag, value in scalars(record):
            self._writer.add_scalar(tag, value, record["step"])
        for alert in record.get("alarms", ()):
            self._writer.add_text("alarms", alert["message"], record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WeightsAndBiases:
    """Logs every number to a run of Weights & Biases, under layer/matrix/quantity.

    The axis is ``monitor/step``, so that it does not interfere with the step of other logs of the run.

    Args:
        run: a run from ``wandb.init``, which the caller finishes; None to start one, which ``close`` finishes.
        options: for ``wandb.init``, such as project="..." or mode="offline".

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, run: Any = None, **options: Any) -> None:
        if run is not None and options:
            raise ValueError(f"options {sorted(options)} with an existing run: expected none, or run=None")
        try:
            import wandb
        except ImportError as error:
            raise ImportError("the WeightsAndBiases sink needs wandb: pip install wandb") from error
        self._own = run is None
        self.run = run if run is not None else wandb.init(**options)
        self.run.define_metric("monitor/step", hidden=True)
        self.run.define_metric("monitor/*", step_metric="monitor/step")

    def __call__(self, record: Record) -> None:
        """Log the numbers of a record, and its alerts."""
        numbers = {f"monitor/{tag}": value for tag, value in scalars(record)}
        self.run.log({**numbers, "monitor/step": record["step"]})
        for alert in record.get("alarms", ()):
            self.run.alert(title=f"{alert['parameter']}: {alert['quantity']}", text=alert["message"])

    def close(self) -> None:
        """Finish the run if this sink started it."""
        if self._own and self.run is not None:
            self.run.finish()
        self.run = None


_LAYER = re.compile(r"^(.*?\.\d+)\.(.+)$")


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """Tags and values of all numbers of a record: "model.layers.0/mlp.up_proj.weight/gradient_norm"."""
    yield "monitor/skipped", record["skipped"]
    yield "monitor/ms", record["ms"]
    for name, entry in record["parameters"].items():
        layer = _LAYER.match(name)
        place = f"{layer[1]}/{layer[2]}" if layer else f"outside of layers/{name}"
        for quantity, value in entry.items():
            if value is not None:
                yield f"{place}/{quantity}", value


def kept_bytes(path: Path, step: int) -> int:
    """The size of a file's records up to and including a step, without an incomplete last line."""
    kept = 0
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            reached = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{str(path)!r} is not a file of records: it has the line {line[:80]!r}") from None
        if reached > step:
            break
        kept += len(line) + 1
    return kept
