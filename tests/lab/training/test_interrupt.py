"""Runs that end before their last step: signals, kill -9, a full disk. What they resume to is held to the bit."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from lab_runs import StopError, assert_equal, checkpoint, final_state, log_without_times, stop_after
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


def run_until(command: list[str], reached: Callable[[], bool]) -> None:
    """Start a process, and kill -9 it as soon as it is where it should be."""
    # One thread as in this process: how a sum is split among threads decides its rounding.
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not reached():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.0005)
    process.kill()
    process.wait()


def test_a_run_killed_in_a_step_and_while_it_writes_a_checkpoint_is_resumed_bit_for_bit(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path
) -> None:
    config = small_config.model_copy(update={"steps": 600, "checkpoint_every": 5})
    config_file, run = tmp_path / "config.toml", tmp_path / "run"
    config_file.write_text(config.to_toml(), encoding="utf-8")
    command = [sys.executable, "-m", "spectrim", "train", "--config", str(config_file), "--cache-dir", str(cache_dir)]
    command += ["--out", str(run)]

    log = run / "log.jsonl"
    run_until(command, lambda: log.exists() and log.read_bytes().count(b"\n") > 12)
    before = log.read_bytes().count(b"\n")
    # From the second checkpoint on, for the first one removes what the kill before may have left.
    writing = lambda: log.read_bytes().count(b"\n") > before + 12 and any(run.glob("checkpoints/.*.partial"))  # noqa: E731
    run_until([*command, "--resume"], writing)
    assert not (run / "result.json").exists()
    train(config, run, resume=True, cache_dir=cache_dir)
    train(config, tmp_path / "whole", cache_dir=cache_dir)
    assert_equal(final_state(run, 600), final_state(tmp_path / "whole", 600))
    assert log_without_times(run) == log_without_times(tmp_path / "whole")
    assert not list(run.rglob("*.partial"))


def run_on_a_full_disk(command: Sequence[str], size: int) -> subprocess.CompletedProcess[str]:
    """A process for which the system refuses to let any file grow beyond a size, as it does on a full disk.

    Never this one: what pytest itself writes may be a file.
    """
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))\n"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    whole = [sys.executable, "-c", limit + command[0], *command[1:]]
    return subprocess.run(whole, capture_output=True, text=True, env=environment)


def test_a_checkpoint_that_does_not_fit_is_one_line_and_costs_nothing_before_it(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path
) -> None:
    train(small_config, tmp_path / "whole", cache_dir=cache_dir)
    run = tmp_path / "run"
    with pytest.raises(StopError):
        train(small_config, run, cache_dir=cache_dir, on_step=stop_after(3))
    command = ["train", "--out", str(run), "--resume", "--cache-dir", str(cache_dir)]
    done = run_on_a_full_disk(["import sys; from spectrim.cli import main; sys.exit(main())", *command], 100_000)
    assert done.returncode == 1
    told = done.stderr.splitlines()
    assert len(told) == 2  # the line that names the run, and this one:
    assert told[1].startswith(f"spectrim: File too large: {checkpoint(run, 4)}; what is done is kept")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002.pt"]
    assert [record["step"] for record in read_log(run / "log.jsonl")] == [1, 2, 3, 4]
    assert main(command) == 0
    assert_equal(final_state(run), final_state(tmp_path / "whole"))
    assert log_without_times(run) == log_without_times(tmp_path / "whole")


FILL_THE_DISK = """
import sys
from pathlib import Path
from spectrim.lab.config import MonitorConfig, TrainConfig
from spectrim.lab.settings import read_toml
from spectrim.lab.training.run import train

config, run, cache, file = map(Path, sys.argv[1:])

def on_step(record):
    if record["step"] == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 50, resource.RLIM_INFINITY))

try:
    train(TrainConfig.parse(read_toml(config), source="test"), run, cache_dir=cache, on_step=on_step)
except OSError as error:
    print(error.strerror, error.filename)
"""


@pytest.mark.parametrize(("name", "every"), [("log.jsonl", 0), ("monitor.jsonl", 1)])
def test_a_record_that_does_not_fit_leaves_its_file_at_the_one_before(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path, name: str, every: int
) -> None:
    config_file, run = tmp_path / "config.toml", tmp_path / "run"
    config = small_config.model_copy(update={"checkpoint_every": 100, "monitor": MonitorConfig(every=every)})
    config_file.write_text(config.to_toml(), encoding="utf-8")
    done = run_on_a_full_disk([FILL_THE_DISK, str(config_file), str(run), str(cache_dir), str(run / name)], 10**9)
    assert done.stdout.strip() == f"File too large {run / name}", done.stderr
    assert (run / name).read_bytes().endswith(b"}\n")
    assert [record["step"] for record in read_log(run / name)] == [1, 2, 3]
