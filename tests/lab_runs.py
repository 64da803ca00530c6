"""What tests of interrupted runs share: how to stop one, and what must be equal afterwards."""

from pathlib import Path
from typing import Any

import torch

from spectrim.lab.logging.log import StepRecord, read_log


class StopError(Exception):
    """Stands for whatever ends a process."""


def stop_after(step: int) -> Any:
    def on_step(record: StepRecord) -> None:
        if record["step"] == step:
            raise StopError

    return on_step


def log_without_times(folder: Path) -> list[dict[str, Any]]:
    records = read_log(folder / "log.jsonl")
    return [{key: value for key, value in record.items() if not key.endswith("_ms")} for record in records]


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}.pt"


def final_state(folder: Path, step: int = 6) -> dict[str, Any]:
    return torch.load(checkpoint(folder, step), weights_only=True)


def assert_equal(one: Any, two: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_equal(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for left, right in zip(one, two, strict=True):
            assert_equal(left, right)
    else:
        assert one == two
