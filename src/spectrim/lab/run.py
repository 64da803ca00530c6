"""The folder of a run, and the rule that nothing in it which a user made is overwritten."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from spectrim.lab.config import TrainConfig, describe_differences, read_toml
from spectrim.lab.errors import LabError
from spectrim.lab.files import PARTIAL, write_text
from spectrim.lab.results import RunResult

__all__ = ["RunFolder"]


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what: the one place that knows the names."""

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
        """See :mod:`spectrim.lab.checkpoint`."""
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
        """The configuration that is here, if any."""
        if not self.config_file.is_file():
            return None
        return TrainConfig.parse(read_toml(self.config_file), source=f"config {str(self.config_file)!r}")

    def check(self, config: TrainConfig, *, resume: bool) -> None:
        """Refuse to train here if that would overwrite anything. Writes nothing.

        Raises:
            LabError: the folder is a file, or holds something and ``resume`` is off, or holds something else than a run
                of this very configuration.
        """
        place = f"--out {str(self.path)!r}"
        if self.path.exists() and not self.path.is_dir():
            raise LabError(f"{place} is a file, expected a folder or a new name")
        # What a process that was killed while it wrote its first file has left is nothing.
        if not self.path.exists() or all(entry.name.endswith(PARTIAL) for entry in self.path.iterdir()):
            return
        if not resume:
            raise LabError(f"{place} is not empty; choose another folder, or continue the run in it with --resume")
        stored = self.stored_config()
        if stored is None:
            raise LabError(f"{place} holds no config.toml, so there is no run in it to resume")
        if changes := describe_differences(stored, config):
            raise LabError(f"{place} holds a run of another configuration: {changes}")

    def create(self, config: TrainConfig) -> None:
        """Make the folder with its configuration; safe to call on a run that :meth:`check` let pass."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.config_file.exists():
            write_text(self.config_file, config.to_toml())

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from training here; ends with the process, however that ends.

        Raises:
            LabError: another process is at it.
        """
        if os.name != "posix":
            yield
            return
        import fcntl

        with self.config_file.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LabError(f"another process is training in {str(self.path)!r}") from None
            except OSError:
                pass  # a file system without locks
            yield

    def result(self) -> RunResult | None:
        """The result of a finished run, or None."""
        if not self.result_file.is_file():
            return None
        return RunResult.model_validate_json(self.result_file.read_text(encoding="utf-8"))
