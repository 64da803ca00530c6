"""Checkpoints: everything that a run needs to go on bit for bit, in one file that is whole or not there.

Files are written beside their place and renamed, and read with ``weights_only=True``, so that a foreign file can be
refused but never executed.
"""

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectrim.lab.errors import LabError
from spectrim.lab.files import write_atomically

__all__ = ["KEPT", "load_latest", "restore", "save"]

FORMAT = "spectrim-checkpoint-1"
KEPT = 2
"""Checkpoints kept in a run: the last one, and one to fall back on."""


def save(folder: Path, *, step: int, data_key: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    """Write the state after ``step`` updates; checkpoints before the last :data:`KEPT` are deleted."""
    path = folder / f"step-{step:08d}.pt"
    state = {
        "format": FORMAT,
        "step": step,
        "data_key": data_key,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random_state": torch.get_rng_state(),
    }
    write_atomically(path, lambda file: torch.save(state, file))
    for old in list_checkpoints(folder)[KEPT:]:
        old.unlink(missing_ok=True)
    return path


def load_latest(folder: Path, *, data_key: str) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None where there is none; an unreadable one is named in a warning.

    Raises:
        LabError: the checkpoint belongs to other data.
    """
    for partial in folder.glob(".*.partial"):
        partial.unlink(missing_ok=True)  # what a process killed while it wrote has left
    for path in list_checkpoints(folder):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or state.get("format") != FORMAT:
                raise ValueError(f"not a checkpoint of format {FORMAT!r}")
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(f"checkpoint {str(path)!r} is skipped: {reason}", stacklevel=2)
            continue
        if state["data_key"] != data_key:
            raise LabError(f"checkpoint {str(path)!r} was trained on other text than the data holds now")
        return state
    return None


def restore(state: dict[str, Any], *, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load a checkpoint into model, optimizer and the global random state; returns its step."""
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random_state"])
    return int(state["step"])


def list_checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    found = [path for path in folder.glob("step-*.pt") if re.fullmatch(r"step-\d+\.pt", path.name)]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("step-")), reverse=True)
