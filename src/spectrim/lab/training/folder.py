"""The folder of a run: the names of its files, and checks that no file of the user is overwritten."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from spectrim.lab.config import TrainConfig, without_paths
from spectrim.lab.errors import LabError
from spectrim.lab.files import PARTIAL, create_text, lock_file, write_text
from spectrim.lab.logging.log import read_log
from spectrim.lab.logging.run_result import RunResult
from spectrim.lab.settings import Config, describe_differences, read_toml

__all__ = ["RunFolder", "stored_settings"]

LOCK = ".lock"
"""The file that the training process locks."""


class RunFolder:
    """Paths of a run's files.

    Attributes:
        config_file: every setting; ``--config`` reads it back.
        log_file: one JSON object a step; TensorBoard's event files lie beside it.
        monitor_file: one JSON object for each measurement of the run's :class:`spectrim.SpectralMonitor`.
        checkpoints: see :mod:`spectrim.lab.training.checkpoints`.
        model: the trained model as a Hugging Face folder.
        result_file: written last; a run that has it is finished.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.toml"
        self.log_file = path / "log.jsonl"
        self.monitor_file = path / "monitor.jsonl"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.result_file = path / "result.json"

    def stored_config(self) -> TrainConfig | None:
        """The stored configuration, if any."""
        return stored_settings(TrainConfig, self.path)

    def check(self, config: TrainConfig, *, resume: bool) -> None:
        """Check that training here overwrites nothing. Writes nothing.

        Paths of data may differ: a checkpoint identifies its text by a key.

        Raises:
            LabError: the folder is a file; it is not empty and ``resume`` is off; it is not the folder of a run with
                this configuration; or the run's checkpoints are gone.
        """
        place = f"--out {str(self.path)!r}"
        if self.path.exists() and not self.path.is_dir():
            raise LabError(f"{place} is a file, expected a folder or a new name")
        if not self.path.exists() or all(map(is_nothing, self.path.iterdir())):
            return
        if not resume:
            raise LabError(f"{place} is not empty; choose another folder, or continue the run in it with --resume")
        stored = self.stored_config()
        if stored is None:
            raise LabError(f"{place} holds no config.toml, so there is no run in it to resume")
        if changes := describe_differences(without_paths(stored), without_paths(config)):
            raise LabError(f"{place} holds a run of another configuration: {changes}")
        if not self.has_checkpoints and (steps := self.steps_behind_a_checkpoint(config)):
            raise LabError(
                f"{place} has a log of {steps} steps and no checkpoint to resume from: restore its checkpoints, or "
                f"choose another folder to begin again"
            )

    @property
    def has_checkpoints(self) -> bool:
        """True if there is any checkpoint, whole or damaged."""
        return any(self.checkpoints.glob("step-*"))

    def steps_behind_a_checkpoint(self, config: TrainConfig) -> int:
        """The number of logged steps if the log shows that there was a checkpoint, else 0."""
        if not self.log_file.is_file() or self.result_file.is_file():
            return 0
        records = read_log(self.log_file)
        saved = len(records) > config.checkpoint_every or any("checkpoint_ms" in record for record in records)
        return len(records) if saved else 0

    def create(self, config: TrainConfig, *, resume: bool = False) -> None:
        """Create the folder and its configuration file; only one process can.

        Raises:
            LabError: another process has created it first, and ``resume`` is off.
        """
        if not create_text(self.config_file, config.to_toml()) and not resume:
            raise LabError(f"another process has begun a run in {str(self.path)!r}")

    def update(self, config: TrainConfig) -> None:
        """Store the current paths of the data; only the process that holds the lock may do so."""
        if self.stored_config() != config:
            write_text(self.config_file, config.to_toml())

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder against other processes until this one ends.

        Raises:
            LabError: another process trains here.
        """
        # A separate file that is never replaced, since a lock belongs to a file, not to its name.
        if (lock := lock_file(self.path / LOCK)) is None:
            raise LabError(f"another process is training in {str(self.path)!r}")
        try:
            yield
        finally:
            lock.release()

    def result(self) -> RunResult | None:
        """The result of a finished run, or None.

        Raises:
            LabError: the file is damaged.
        """
        if not self.result_file.is_file():
            return None
        try:
            return RunResult.model_validate_json(self.result_file.read_text(encoding="utf-8"))
        except ValueError:
            raise LabError(f"{str(self.result_file)!r} is not the result of a run") from None


def is_nothing(entry: Path) -> bool:
    """True for a lock, and for a partial file that a killed process left behind."""
    return entry.name == LOCK or entry.name.endswith(PARTIAL)


AnyConfig = TypeVar("AnyConfig", bound=Config)


def stored_settings(model: type[AnyConfig], out: Path, *, kind: str = "") -> AnyConfig | None:
    """The settings in a folder's ``config.toml``; None if there is no such file.

    Raises:
        LabError: ``kind`` is given, and the folder has other files.
    """
    file = out / "config.toml"
    if file.is_file():
        return model.parse(read_toml(file), source=f"config {str(file)!r}")
    if kind and out.exists() and (not out.is_dir() or not all(map(is_nothing, out.iterdir()))):
        raise LabError(f"{str(out)!r} exists and is no {kind}; choose another --name")
    return None
