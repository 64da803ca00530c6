"""The monitor of a run in the lab: it changes nothing, its file goes on where a run does, its time is its own."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import spectrim.lab.training.loop
import spectrim.monitor.gradient_norms
from lab_runs import StopError, assert_equal, final_state, log_without_times, stop_after
from spectrim.lab.config import MonitorConfig, TrainConfig
from spectrim.lab.errors import LabError
from spectrim.lab.experiments.settings import SweepConfig
from spectrim.lab.logging.log import read_log
from spectrim.lab.logging.monitor_log import read_measurements
from spectrim.lab.settings import read_toml, toml
from spectrim.lab.training.folder import RunFolder
from spectrim.lab.training.monitoring import exact_patterns
from spectrim.lab.training.run import train
from spectrim.monitor.measurement import Measurement


def monitored(config: TrainConfig, **settings: Any) -> TrainConfig:
    return config.model_copy(update={"monitor": MonitorConfig(**settings)})


def without_times(folder: Path) -> list[dict[str, Any]]:
    records = read_measurements(RunFolder(folder).monitor_file)
    return [{key: value for key, value in record.items() if key != "ms"} for record in records]


@pytest.mark.parametrize("recipe", ["adamw+clip", "torch.optim:SGD"])
def test_a_monitor_changes_neither_weights_nor_losses_nor_state(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path, recipe: str
) -> None:
    config = small_config.model_copy(update={"recipe": recipe})
    train(monitored(config, every=0), tmp_path / "off", cache_dir=cache_dir)
    train(monitored(config, every=1, exact_times=3), tmp_path / "on", cache_dir=cache_dir)
    on, off = final_state(tmp_path / "on"), final_state(tmp_path / "off")
    for key in ("model", "optimizer", "random_state"):
        assert_equal(on[key], off[key])
    assert log_without_times(tmp_path / "on") == log_without_times(tmp_path / "off")
    assert not (tmp_path / "off" / "monitor.jsonl").exists()
    assert all("monitor_ms" not in record for record in read_log(tmp_path / "off" / "log.jsonl"))


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_resumed_run_has_the_measurements_of_the_uninterrupted_one(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path, stop: int
) -> None:
    config = monitored(small_config, every=1, exact_times=2)
    train(config, tmp_path / "whole", cache_dir=cache_dir)
    with pytest.raises(StopError):
        train(config, tmp_path / "parts", cache_dir=cache_dir, on_step=stop_after(stop))
    with (tmp_path / "parts" / "monitor.jsonl").open("a") as file:
        file.write('{"step": ')
    train(config, tmp_path / "parts", resume=True, cache_dir=cache_dir)
    whole = without_times(tmp_path / "whole")
    assert [record["step"] for record in whole] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in whole if "spectra" in record] == [3, 6]
    assert without_times(tmp_path / "parts") == whole
    assert_equal(final_state(tmp_path / "parts")["monitor"], final_state(tmp_path / "whole")["monitor"])


def test_a_run_of_a_version_without_monitor_goes_on_with_one(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path
) -> None:
    train(small_config, tmp_path / "whole", cache_dir=cache_dir)
    run = tmp_path / "run"
    with pytest.raises(StopError):
        train(monitored(small_config, every=0), run, cache_dir=cache_dir, on_step=stop_after(3))
    settings = read_toml(run / "config.toml")
    del settings["monitor"]
    (run / "config.toml").write_text(toml(settings))
    for path in (run / "checkpoints").iterdir():
        state = torch.load(path, weights_only=True)
        del state["monitor"], state["config"]["monitor"]
        torch.save(state, path)
    train(small_config, run, resume=True, cache_dir=cache_dir)
    assert_equal(final_state(run)["model"], final_state(tmp_path / "whole")["model"])
    assert without_times(run) == without_times(tmp_path / "whole")[2:]


def test_other_settings_of_the_monitor_are_other_settings(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path
) -> None:
    with pytest.raises(StopError):
        train(small_config, tmp_path / "run", cache_dir=cache_dir, on_step=stop_after(3))
    with pytest.raises(LabError, match=r"monitor\.every is None there, 5 here"):
        train(monitored(small_config, every=5), tmp_path / "run", resume=True, cache_dir=cache_dir)


def test_the_time_of_a_monitor_is_in_no_other_share(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def slow(name: str, seconds: float, owner: Any) -> None:
        before = getattr(owner, name)

        def slowly(*args: Any) -> Any:
            now[0] += seconds
            return before(*args)

        monkeypatch.setattr(owner, name, slowly)

    slow("take_gradients", 1.0, Measurement)
    slow("take_step", 2.0, Measurement)
    slow("squared_norms", 0.125, spectrim.monitor.gradient_norms)
    slow("clip_gradient", 0.5, spectrim.lab.training.loop)
    result = train(monitored(small_config, every=3, exact_times=0), tmp_path / "run", cache_dir=cache_dir)
    records = read_log(tmp_path / "run" / "log.jsonl")
    # The norms of all gradients are taken together, once a backward pass.
    assert [record["monitor_ms"] for record in records] == [0, 0, 3000 + 125] * 2
    for record in records:
        others = {key: value for key, value in record.items() if key.endswith("_ms") and key != "monitor_ms"}
        assert {key for key, value in others.items() if value} == {"gradient_clip_ms"}
    assert result.step_ms == 500


def test_a_layer_that_is_not_there_is_refused_before_anything_is_written(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path
) -> None:
    with pytest.raises(LabError, match=r"monitor\.layers has 3, but the model's layers with matrices are from 0 to 0"):
        train(monitored(small_config, layers=(0, 3)), tmp_path / "run", cache_dir=cache_dir)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("layers", "expected"), [(None, [0, 3, 6]), ((1,), [1])])
def test_exact_spectra_are_those_of_some_layers(layers: tuple[int, ...] | None, expected: list[int]) -> None:
    blocks = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(7))
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(3, 2), "blocks": blocks, "norm": torch.nn.LayerNorm(2)})
    patterns = exact_patterns(model, MonitorConfig(layers=layers))
    assert patterns == [f"blocks.{layer}.*" for layer in expected]
    assert exact_patterns(torch.nn.ModuleDict({"head": torch.nn.Linear(2, 2)}), MonitorConfig()) == ["*"]


def test_what_is_no_file_of_records_is_refused_and_left_alone(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path
) -> None:
    with pytest.raises(StopError):
        train(small_config, tmp_path / "run", cache_dir=cache_dir, on_step=stop_after(3))
    (tmp_path / "run" / "monitor.jsonl").write_text("mine\n")
    with pytest.raises(LabError, match="is not a file of records"):
        train(small_config, tmp_path / "run", resume=True, cache_dir=cache_dir)
    assert (tmp_path / "run" / "monitor.jsonl").read_text() == "mine\n"


def test_whoever_asks_is_told_every_record(small_config: TrainConfig, tmp_path: Path, cache_dir: Path) -> None:
    told: list[Any] = []
    train(monitored(small_config, every=2), tmp_path / "run", cache_dir=cache_dir, on_measure=told.append)
    assert json.loads(json.dumps(told)) == read_measurements(tmp_path / "run" / "monitor.jsonl")


def test_trials_of_a_sweep_are_not_monitored_unless_asked() -> None:
    assert SweepConfig(recipes=("adamw",)).monitor.every == 0
    asked = SweepConfig.parse({"recipes": ["adamw"], "monitor": {"exact_times": 2}}, source="test")
    assert asked.monitor == MonitorConfig(exact_times=2)
