"""The folder of a run: the names of its files, and checks that no file of the user is overwritten."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's files."""

    path: Path

    @property
    def config_file(self) -> Path:
        """Every setting, accepted back by ``--config``."""
        return self.path / "config.toml"

    @property
    def log_file(self) -> Path:
        """One JSON object a step; TensorBoard's event files lie beside it."""
        return self.path / "log.jsonl"

    @property
    def monitor_file(self) -> Path:
        """One JSON object a measurement of :class:`spectrim.SpectralMonitor`, where the run has one."""
        return self.path / "monitor.jsonl"

    @property
    def checkpoints(self) -> Path:
        """See :mod:`spectrim.lab.training.checkpoints`."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The trained model as a Hugging Face folder."""
        return self.path / "model"

    @property
    def result_file(self) -> Path:
        """Written last: a run that has it is finished."""
        return self.path / "result.json"

    def stored_config(self) -> TrainConfig | None:
        """The stored configuration, if any."""
        return stored_settings(TrainConfig, self.path)

    def check(self, config: TrainConfig, *, resume: bool) -> None:
        """Check that training here overwrites nothing; writes nothing itself.

        Paths of data may differ: the checkpoints check that the text is the same.

        Raises:
            LabError: the folder is a file; it is not empty and ``resume`` is off; it holds something other than a run
            of this configuration; or the run's checkpoints are gone.
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
        """Create the folder with its configuration, as the only process that does.

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
    """The settings in a folder's ``config.toml``; None where there are none.

    Raises:
        LabError: ``kind`` is given, and the folder holds something else.
    """
    file = out / "config.toml"
    if file.is_file():
        return model.parse(read_toml(file), source=f"config {str(file)!r}")
    if kind and out.exists() and (not out.is_dir() or not all(map(is_nothing, out.iterdir()))):
        raise LabError(f"{str(out)!r} exists and is no {kind}; choose another --name")
    return None
