"""Checkpoints: everything that a run needs to go on bit for bit, in one file that is whole or not there.

Files are written beside their place and renamed, checked by their checksums, and read with ``weights_only=True``, so
that a foreign file can be refused but never executed. A checkpoint says which run it is of; one of another run is as
foreign as a damaged one, and the newest that is whole is used.
"""

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectrim.lab.config import TrainConfig, describe_differences
from spectrim.lab.errors import LabError, LabWarning
from spectrim.lab.files import remove_partial, write_atomically

__all__ = ["KEPT", "load_latest", "restore", "save"]

FORMAT = "spectrim-checkpoint-2"
KEPT = 2
"""Checkpoints kept in a run: the last one, and one to fall back on."""


class RefusedError(Exception):
    """Why a file is not a checkpoint of this run."""


def save(
    folder: Path,
    *,
    step: int,
    config: TrainConfig,
    data_key: str,
    machine: dict[str, str | int],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> Path:
    """Write the state after ``step`` updates; checkpoints before the last :data:`KEPT` are deleted.

    Args:
        folder: where checkpoints are kept.
        step: updates made so far.
        config: of the run.
        data_key: of the tokens that it is trained on.
        machine: what rounding depends on beside the configuration; a change is told when the run is resumed.
        model: its weights are saved.
        optimizer: its state is saved.

    Raises:
        LabError: the optimizer's state holds more than plain values and tensors; told at a run's first checkpoint.
        OSError: the disk is full, say. What was there before is still there.
    """
    path = folder / f"step-{step:08d}.pt"
    first = not list_checkpoints(folder)
    state = {
        "format": FORMAT,
        "step": step,
        "config": config.model_dump(mode="json"),
        "data_key": data_key,
        "machine": machine,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random_state": torch.get_rng_state(),
        "accelerator_random_state": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    write_atomically(path, lambda file: torch.save(state, file))
    if first:
        # An optimizer from outside may keep what only code could restore: say so now, not when there is work to lose.
        try:
            read(path, config=config, data_key=data_key)
        except RefusedError as reason:
            path.unlink()
            raise LabError(
                f"the state of {type(optimizer).__name__} cannot be kept in a checkpoint: {reason}"
            ) from None
    # Those after this step, which were refused when the run was resumed, may be anybody's.
    before = [old for old in list_checkpoints(folder) if step_of(old) <= step]
    for old in before[KEPT:]:
        old.unlink(missing_ok=True)
    return path


def load_latest(
    folder: Path, *, config: TrainConfig, data_key: str, machine: dict[str, str | int]
) -> dict[str, Any] | None:
    """The newest checkpoint of this run, or None where there is no file at all.

    Files that are refused on the way to it, and a machine other than the checkpoint's, are told as :class:`LabWarning`.

    Raises:
        LabError: there are files, and none of them is a whole checkpoint of this run.
    """
    remove_partial(folder)
    refused: list[str] = []
    for path in list_checkpoints(folder):
        try:
            state = read(path, config=config, data_key=data_key)
        except RefusedError as reason:
            refused.append(f"checkpoint {str(path)!r} is refused: {reason}")
            continue
        for message in refused:
            warnings.warn(f"{message}; going on from step {state['step']}", LabWarning, stacklevel=2)
        for key, value in machine.items():
            if (before := state["machine"].get(key)) != value:
                message = f"{key} was {before} until step {state['step']} and is {value} now: rounding may differ"
                warnings.warn(message, LabWarning, stacklevel=2)
        return state
    if refused:
        raise LabError(f"{'; '.join(refused)}; there is no other: move it away to begin again from the first step")
    return None


def read(path: Path, *, config: TrainConfig, data_key: str) -> dict[str, Any]:
    """A file that is whole and of this run.

    Raises:
        RefusedError: it is not.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        state = torch.load(path, map_location="cpu", weights_only=True) if damaged is None else None
    except MemoryError:
        raise
    except Exception as error:
        # What is no archive, or holds anything but plain values and tensors, may fail in any way.
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise RefusedError(f"it cannot be read ({reason or type(error).__name__})") from None
    if damaged is not None:
        raise RefusedError(f"its part {damaged!r} is damaged")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise RefusedError(f"it is not of format {FORMAT!r}")
    if state["step"] != step_of(path):
        raise RefusedError(f"it is of step {state['step']}")
    if changes := describe_differences(TrainConfig.parse(state["config"], source=str(path)), config):
        raise RefusedError(f"it is of another run ({changes})")
    if state["data_key"] != data_key:
        raise RefusedError("it was trained on other text than the data holds now")
    return state


def restore(state: dict[str, Any], *, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load a checkpoint into model, optimizer and the global random states; returns its step."""
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random_state"])
    if state["accelerator_random_state"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["accelerator_random_state"])
    return int(state["step"])


def list_checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    found = [path for path in folder.glob("step-*.pt") if re.fullmatch(r"step-\d+\.pt", path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))
