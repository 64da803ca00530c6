"""What tests of interrupted runs share: how to stop one, and what must be equal afterwards."""

import io
import os
import signal
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from spectrim.cli import main
from spectrim.lab.config import TrainConfig
from spectrim.lab.logging.log import StepRecord, read_log
from spectrim.lab.training.run import train


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


# -- What processes of their own do --------------------------------------------------------------------------------


def run_and_be_killed(moment: str, step: int, command: list[str]) -> int:
    """A command that ends by kill -9: in this process's step of that number, once the weights have moved and before
    anything says so; or ("checkpoint") when half of the checkpoint of that step of the run is written."""
    taken, save = 0, torch.save

    def after_a_step(*_: object) -> None:
        nonlocal taken
        taken += 1
        if moment == "step" and taken == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def save_half(state: dict[str, Any], file: BinaryIO) -> None:
        whole = io.BytesIO()
        save(state, whole)
        if moment == "checkpoint" and state["step"] == step:
            file.write(whole.getvalue()[: whole.tell() // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        file.write(whole.getvalue())

    register_optimizer_step_post_hook(after_a_step)
    torch.save = save_half  # type: ignore[assignment]
    return main(command)


def limit_files(size: int) -> None:
    """Let the system refuse to let any file of this process grow beyond a size, as it does on a full disk."""
    import resource  # not on Windows

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def run_on_a_full_disk(command: list[str], size: int) -> int:
    """A command whose files may not grow beyond a size."""
    limit_files(size)
    return main(command)


def train_until_the_disk_is_full(config: TrainConfig, run: Path, cache_dir: Path, file: Path) -> int:
    """After the third step one more record does not fit into a file; prints the error's words and its file."""

    def on_step(record: StepRecord) -> None:
        if record["step"] == 3:
            limit_files(file.stat().st_size + 50)

    try:
        train(config, run, cache_dir=cache_dir, on_step=on_step)
    except OSError as error:
        print(error.strerror, error.filename)
    return 0
