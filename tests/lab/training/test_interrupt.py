"""Runs that end before their last step: signals, kill -9, a full disk. What they resume to is held to the bit."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import worlds
from lab_runs import (
    StopError,
    assert_equal,
    checkpoint,
    final_state,
    log_without_times,
    run_and_be_killed,
    run_on_a_full_disk,
    stop_after,
    train_until_the_disk_is_full,
)
from spectrim.cli import main
from spectrim.lab.config import MonitorConfig, TrainConfig
from spectrim.lab.errors import Interrupted
from spectrim.lab.logging.log import StepRecord, read_log
from spectrim.lab.training.interrupt import StopRequest
from spectrim.lab.training.run import train


@pytest.fixture
def config_file(small_config: TrainConfig, tmp_path: Path) -> Path:
    file = tmp_path / "config.toml"
    file.write_text(small_config.to_toml(), encoding="utf-8")
    return file


def send_after(step: int, number: int) -> Callable[[StepRecord], None]:
    def on_step(record: StepRecord) -> None:
        if record["step"] == step:
            os.kill(os.getpid(), number)

    return on_step


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint_of_the_step_it_came_in(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path, number: signal.Signals
) -> None:
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"stopped by {number.name} after step 3 of 6") as caught:
        train(small_config, tmp_path / "run", cache_dir=cache_dir, on_step=send_after(3, number))
    assert caught.value.number == number
    assert signal.getsignal(number) == handler
    assert checkpoint(tmp_path / "run", 3).exists()
    assert [record["step"] for record in read_log(tmp_path / "run" / "log.jsonl")] == [1, 2, 3]
    train(small_config, tmp_path / "run", resume=True, cache_dir=cache_dir)
    train(small_config, tmp_path / "whole", cache_dir=cache_dir)
    assert_equal(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))
    assert log_without_times(tmp_path / "run") == log_without_times(tmp_path / "whole")


def test_the_second_signal_is_left_to_the_system() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_says_how_to_go_on_and_exits_as_a_shell_expects(
    config_file: Path,
    tmp_path: Path,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    code: int,
) -> None:
    step = send_after(2, number)
    monkeypatch.setattr("spectrim.lab.logging.terminal.TerminalProgress.step", lambda _, record: step(record))
    out = str(tmp_path / "run")
    command = ["train", "--config", str(config_file), "--out", out, "--cache-dir", str(cache_dir)]
    assert main(command) == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert "after step 2 of 6" in last
    assert "--resume" in last
    assert main([*command, "--resume"]) == 0


def test_a_run_killed_in_a_step_and_while_it_writes_a_checkpoint_is_resumed_bit_for_bit(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path
) -> None:
    config = small_config.model_copy(update={"steps": 24, "checkpoint_every": 5})
    config_file, run = tmp_path / "config.toml", tmp_path / "run"
    config_file.write_text(config.to_toml(), encoding="utf-8")
    command = ["train", "--config", str(config_file), "--cache-dir", str(cache_dir), "--out", str(run)]
    assert worlds.alone(run_and_be_killed, "step", 13, command).code == -signal.SIGKILL
    assert [record["step"] for record in read_log(run / "log.jsonl")][-1] == 12
    assert worlds.alone(run_and_be_killed, "checkpoint", 20, [*command, "--resume"]).code == -signal.SIGKILL
    assert [path.name for path in sorted(run.glob("checkpoints/step-*"))] == ["step-00000010.pt", "step-00000015.pt"]
    assert list(run.glob("checkpoints/.*.partial"))
    assert not (run / "result.json").exists()
    train(config, run, resume=True, cache_dir=cache_dir)
    train(config, tmp_path / "whole", cache_dir=cache_dir)
    assert_equal(final_state(run, 24), final_state(tmp_path / "whole", 24))
    assert log_without_times(run) == log_without_times(tmp_path / "whole")
    assert not list(run.rglob("*.partial"))


def test_a_checkpoint_that_does_not_fit_is_one_line_and_costs_nothing_before_it(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path
) -> None:
    train(small_config, tmp_path / "whole", cache_dir=cache_dir)
    run = tmp_path / "run"
    with pytest.raises(StopError):
        train(small_config, run, cache_dir=cache_dir, on_step=stop_after(3))
    command = ["train", "--out", str(run), "--resume", "--cache-dir", str(cache_dir)]
    done = worlds.alone(run_on_a_full_disk, command, 100_000)
    assert done.code == 1
    told = done.err.splitlines()
    assert len(told) == 2  # the line that names the run, and this one:
    assert told[1].startswith(f"spectrim: File too large: {checkpoint(run, 4)}; what is done is kept")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002.pt"]
    assert [record["step"] for record in read_log(run / "log.jsonl")] == [1, 2, 3, 4]
    assert main(command) == 0
    assert_equal(final_state(run), final_state(tmp_path / "whole"))
    assert log_without_times(run) == log_without_times(tmp_path / "whole")


@pytest.mark.parametrize(("name", "every"), [("log.jsonl", 0), ("monitor.jsonl", 1)])
def test_a_record_that_does_not_fit_leaves_its_file_at_the_one_before(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path, name: str, every: int
) -> None:
    run = tmp_path / "run"
    config = small_config.model_copy(update={"checkpoint_every": 100, "monitor": MonitorConfig(every=every)})
    done = worlds.alone(train_until_the_disk_is_full, config, run, cache_dir, run / name)
    assert done.out.strip() == f"File too large {run / name}", done.err
    assert (run / name).read_bytes().endswith(b"}\n")
    assert [record["step"] for record in read_log(run / name)] == [1, 2, 3]
