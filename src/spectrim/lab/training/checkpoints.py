"""Checkpoints: the state from which a run resumes bit for bit, in one file that is either complete or absent.

A run on several processes has a folder instead (:mod:`spectrim.lab.training.sharded_checkpoints`), under the same
rules; either kind can be resumed on one process or several.

A file is written under a temporary name and renamed. Reading checks its checksums, and uses ``weights_only=True``, so
that no code in it is executed. A checkpoint names its run. Damaged checkpoints and those of other runs are skipped, and
the newest complete one is used.
"""

import re
import shutil
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.lab.config import TrainConfig, without_paths
from spectrim.lab.errors import LabError, LabWarning
from spectrim.lab.files import PARTIAL, remove_partial, write_atomically
from spectrim.lab.settings import describe_differences
from spectrim.lab.training.processes import ONE_PROCESS, Parallel, drawn_seed

__all__ = ["KEPT", "Checkpoints", "list_checkpoints", "open_whole", "read_parts", "restore", "step_of"]

FORMAT = "spectrim-checkpoint-2"
SHARDED_FORMAT = "spectrim-sharded-checkpoint-1"
KEPT = 2
"""Checkpoints kept in a run: the last one and the one before it."""


class RefusedError(Exception):
    """The reason why a file is not a checkpoint of this run."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run."""

    folder: Path
    config: TrainConfig
    data_key: str
    """Identifies the tokens that the run is trained on."""
    machine: dict[str, str | int]
    """Settings outside the configuration that decide rounding; resuming under others warns."""
    parallel: Parallel = ONE_PROCESS

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, monitor: dict[str, Any] | None = None
    ) -> None:
        """Write the state after ``step`` updates, with the monitor's if there is one, and delete all but the last
        :data:`KEPT` checkpoints. All ranks take part.

        Raises:
            LabError: the optimizer's state holds more than plain values and tensors; raised at the first checkpoint.
            OSError: a write failed, as on a full disk; earlier checkpoints are unchanged.
        """
        parallel = self.parallel
        header: dict[str, Any] = {
            "format": FORMAT if parallel.ranks == 1 else SHARDED_FORMAT,
            "step": step,
            "config": self.config.model_dump(mode="json"),
            "data_key": self.data_key,
            "machine": self.machine,
            "monitor": monitor,
        }
        first = parallel.from_first(lambda: not list_checkpoints(self.folder))
        if parallel.ranks == 1:
            path = self.folder / f"step-{step:08d}.pt"
            state = {
                **header,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "random_state": torch.get_rng_state(),
                "accelerator_random_state": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            }
            if path.is_dir():
                delete(path)  # one that was refused when the run was resumed
            write_atomically(path, lambda file: torch.save(state, file))
        else:
            from spectrim.lab.training.sharded_checkpoints import save_shards

            path = self.folder / f"step-{step:08d}"
            save_shards(path, header, model=model, optimizer=optimizer, parallel=parallel)
        parallel.from_first(lambda: self._tidy(path, first, optimizer))

    def _tidy(self, path: Path, first: bool, optimizer: torch.optim.Optimizer) -> None:
        """Check that a run's first checkpoint can be read back; delete old ones."""
        if first:
            # An external optimizer may keep objects that only code can restore: fail now, before there is work to lose.
            try:
                self.read(path)
            except RefusedError as reason:
                delete(path)
                name = type(optimizer).__name__
                raise LabError(f"the state of {name} cannot be kept in a checkpoint: {reason}") from None
        # Checkpoints after this step were refused when the run was resumed and may belong to others: keep them.
        before = [old for old in list_checkpoints(self.folder) if step_of(old) <= step_of(path)]
        for old in before[KEPT:]:
            delete(old)

    def load_latest(self) -> dict[str, Any] | None:
        """The newest checkpoint of this run, or None if there is no file. Warns (:class:`LabWarning`) of newer files
        that are refused, and of a machine other than the checkpoint's.

        Raises:
            LabError: there are files, but none is a complete checkpoint of this run.
        """
        if self.parallel.ranks == 1:
            return self._find_latest()[1]
        # One rank checks and chooses, so that all resume from the same one.
        path = self.parallel.from_first(lambda: self._find_latest()[0])
        return None if path is None else open_state(path)

    def _find_latest(self) -> tuple[Path | None, dict[str, Any] | None]:
        remove_partial(self.folder)
        messages: list[str] = []
        for path in list_checkpoints(self.folder):
            try:
                state = self.read(path)
            except RefusedError as reason:
                messages.append(f"checkpoint {str(path)!r} is refused: {reason}")
                continue
            step = state["step"]
            messages = [f"{message}; going on from step {step}" for message in messages]
            saved = OLDER_MACHINE | state["machine"]
            for key, value in (OLDER_MACHINE | self.machine).items():
                if (before := saved.get(key)) != value:
                    messages.append(f"{key} was {before} until step {step} and is {value} now: rounding may differ")
            for message in messages:
                warnings.warn(message, LabWarning, stacklevel=3)
            return path, state
        if messages:
            raise LabError(f"{'; '.join(messages)}; there is no other: move it away to begin again from the first step")
        return None, None

    def read(self, path: Path) -> dict[str, Any]:
        """Read a file or folder, and check that it is complete and of this run.

        Raises:
            RefusedError: it is not.
        """
        try:
            state = open_whole(path)
            self._check_identity(state, path)
            return state
        except (RefusedError, MemoryError):
            raise
        except Exception as error:
            # A file that is no archive, or has other content, may fail in any way.
            reason = str(error).strip().partition("\n")[0].partition(". ")[0]
            raise RefusedError(f"it cannot be read ({reason or type(error).__name__})") from None

    def _check_identity(self, state: dict[str, Any], path: Path) -> None:
        """Refuse the checkpoint of another step, run or text."""
        if state["step"] != step_of(path):
            raise RefusedError(f"it is of step {state['step']}")
        stored = TrainConfig.parse(state["config"], source="its configuration")
        if changes := describe_differences(without_paths(stored), without_paths(self.config)):
            raise RefusedError(f"it is of another run ({changes})")
        if state["data_key"] != self.data_key:
            raise RefusedError("it was trained on other text than the data holds now")


def open_whole(path: Path) -> dict[str, Any]:
    """Read a checkpoint, and check its checksums and its keys.

    Raises:
        RefusedError: something is missing or damaged. A file that is no checkpoint may raise any error.
    """
    if not state_file(path).is_file():
        raise RefusedError("its part 'state.pt' is missing" if path.is_dir() else "it is no file")
    with zipfile.ZipFile(state_file(path)) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise RefusedError(f"its part {damaged!r} is damaged")
    state = open_state(path)
    expected, kinds = (SHARDED_FORMAT, SHARDED_KINDS) if path.is_dir() else (FORMAT, KINDS)
    if not isinstance(state, dict) or state.get("format") != expected:
        raise RefusedError(f"it is not of format {expected!r}")
    for key, kind in kinds.items():
        if not isinstance(state.get(key), kind):
            raise RefusedError(f"its {key!r} is missing or damaged")
    if path.is_dir():
        from spectrim.lab.training.sharded_checkpoints import damaged_part

        if (part := damaged_part(path, state["files"])) is not None:
            raise RefusedError(f"its part {part!r} is missing or damaged")
    return state


HEADER = {"step": int, "config": dict, "data_key": str, "machine": dict}
"""Keys that every checkpoint has, and the types of their values."""

KINDS = {**HEADER, "model": dict, "optimizer": dict, "random_state": Tensor}
SHARDED_KINDS = {**HEADER, "files": dict, "plain": dict}

OLDER_MACHINE = {"ranks": 1, "parallel": "one process", "kernels": "torch", "compiled": "no"}
"""Values of keys that checkpoints of older versions lack."""


def open_state(path: Path) -> dict[str, Any]:
    """Read a checkpoint without checks; of a sharded one, all but its tensors."""
    state: dict[str, Any] = torch.load(state_file(path), map_location="cpu", weights_only=True)
    return {**state, "folder": path} if path.is_dir() else state


def read_parts(path: Path, keys: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The weights in a checkpoint, and the optimizer's state under these keys, by parameter. Builds no optimizer, so no
    external code runs.
    """
    state, wanted = open_state(path), frozenset(keys)
    if path.is_dir():
        from spectrim.lab.training.sharded_checkpoints import read_tensors

        return read_tensors(path, wanted)
    saved = state["optimizer"]
    names = {
        index: name
        for group in saved["param_groups"]
        for index, name in zip(group["params"], group.get("param_names", ()), strict=False)
    }
    moments = {
        names[index]: {key: value for key, value in entry.items() if key in wanted and isinstance(value, Tensor)}
        for index, entry in saved["state"].items()
        if index in names
    }
    return state["model"], moments


def restore(
    state: dict[str, Any],
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parallel: Parallel = ONE_PROCESS,
) -> int:
    """Load a checkpoint into model and optimizer; returns its step.

    If one process wrote it and one resumes, the global random states are restored too; otherwise each step draws its
    own from seed and step.

    Raises:
        LabError: the checkpoint does not fit them.
    """
    step = int(state["step"])
    try:
        load(state, step, model=model, optimizer=optimizer, parallel=parallel)
    except (LabError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise LabError(f"the checkpoint of step {step} does not fit model and optimizer: {reason}") from error
    return step


def load(
    state: dict[str, Any], step: int, *, model: nn.Module, optimizer: torch.optim.Optimizer, parallel: Parallel
) -> None:
    if "folder" in state:
        from spectrim.lab.training.sharded_checkpoints import load_shards

        load_shards(state["folder"], state["plain"], model=model, optimizer=optimizer, parallel=parallel)
        torch.manual_seed(drawn_seed(int(state["config"]["seed"]), step, 0))
        return
    if parallel.ranks > 1:
        from spectrim.lab.training.sharded_checkpoints import load_whole

        load_whole(state, model=model, optimizer=optimizer)
        return
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random_state"])
    if state["accelerator_random_state"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["accelerator_random_state"])


def delete(path: Path) -> None:
    """Remove a checkpoint; a folder is renamed first, so that a part of it is never taken for a checkpoint."""
    if path.is_dir():
        path = path.rename(path.parent / f".{path.name}{PARTIAL}")
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+(\.pt)?", path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step that a checkpoint's name states."""
    return int(path.stem.removeprefix("step-"))


def state_file(path: Path) -> Path:
    return path / "state.pt" if path.is_dir() else path
