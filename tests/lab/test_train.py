import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from spectrim.lab.config import TrainConfig, read_toml
from spectrim.lab.errors import LabError
from spectrim.lab.log import Record, read_log
from spectrim.lab.results import RunResult
from spectrim.lab.train import prepare, train

TIMES = {"rest_ms", "forward_backward_ms", "optimizer_ms", "evaluation_ms", "checkpoint_ms"}


class StopError(Exception):
    """Stands for whatever ends a process."""


def stop_after(step: int) -> Any:
    def on_step(record: Record) -> None:
        if record["step"] == step:
            raise StopError

    return on_step


def log_without_times(folder: Path) -> list[dict[str, Any]]:
    records = read_log(folder / "log.jsonl")
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def final_state(folder: Path, step: int = 6) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"step-{step:08d}.pt", weights_only=True)


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


@pytest.mark.parametrize("recipe", ["adamw", "adamw+shrink+clip", "spectra", "muon"])
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_resumed_run_equals_the_uninterrupted_one(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path, recipe: str, stop: int
) -> None:
    config = small_config.model_copy(update={"recipe": recipe})
    whole = train(config, tmp_path / "whole", cache_dir=cache_dir)
    with pytest.raises(StopError):
        train(config, tmp_path / "parts", cache_dir=cache_dir, on_step=stop_after(stop))
    assert not (tmp_path / "parts" / "result.json").exists()
    # What a killed process leaves at its log's end: steps after the checkpoint, and half a line.
    with (tmp_path / "parts" / "log.jsonl").open("a") as file:
        file.write('{"step": ')
    torch.rand(stop)  # the caller's random state is no part of a run
    parts = train(config, tmp_path / "parts", resume=True, cache_dir=cache_dir)

    assert_equal(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))
    assert log_without_times(tmp_path / "parts") == log_without_times(tmp_path / "whole")
    assert parts.final_loss == whole.final_loss
    assert parts.curve == whole.curve


def test_a_run_leaves_what_the_documentation_says(small_config: TrainConfig, tmp_path: Path, cache_dir: Path) -> None:
    out = tmp_path / "run"
    result = train(small_config, out, cache_dir=cache_dir)
    records = read_log(out / "log.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["tokens"] for record in records] == [32, 64, 96, 128, 160, 192]
    assert [record["step"] for record in records if "val_loss" in record] == [2, 4, 6]
    assert result.final_loss == records[-1]["val_loss"]
    assert all(record["optimizer_ms"] > 0 and record["forward_backward_ms"] > 0 for record in records)
    assert RunResult.model_validate_json((out / "result.json").read_text()) == result
    assert TrainConfig.parse(read_toml(out / "config.toml"), source="test") == prepare(small_config)
    assert list(out.glob("events.out.tfevents.*"))
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000004.pt", "step-00000006.pt"]


def test_the_exported_model_loads_and_has_the_final_loss(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path
) -> None:
    out = tmp_path / "run"
    train(small_config, out, cache_dir=cache_dir)
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    assert_equal(dict(model.state_dict()), dict(final_state(out)["model"]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    assert tokenizer.decode(tokenizer("the people of the union").input_ids) == "the people of the union"


def test_weight_measures_agree_with_the_exported_weights(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path
) -> None:
    result = train(small_config, tmp_path / "run", cache_dir=cache_dir)
    weights = final_state(tmp_path / "run")["model"]
    assert result.weight_norm == pytest.approx(
        math.sqrt(sum(float(w.double().square().sum()) for w in weights.values()))
    )
    hidden = [w for name, w in weights.items() if "layers" in name and w.ndim == 2]
    assert len(hidden) == 7
    expected = max(float(torch.linalg.svdvals(w.double())[0]) for w in hidden)
    assert result.largest_singular_value == pytest.approx(expected, rel=1e-5)
    # AdamW keeps two numbers a weight, and a step count of float32 a parameter at most.
    assert 0 <= result.state_bytes - 8 * result.parameters <= 4 * len(weights)


def test_a_finished_run_is_not_repeated(small_config: TrainConfig, tmp_path: Path, cache_dir: Path) -> None:
    result = train(small_config, tmp_path / "run", cache_dir=cache_dir)
    again = train(small_config, tmp_path / "run", resume=True, cache_dir=cache_dir, on_step=stop_after(1))
    assert again == result


def test_a_folder_that_holds_something_is_refused_and_left_alone(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for resume, message in ((False, "not empty"), (True, r"no config\.toml")):
        with pytest.raises(LabError, match=message):
            train(small_config, tmp_path, resume=resume, cache_dir=cache_dir)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_resuming_with_another_configuration_is_refused_naming_the_key(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path
) -> None:
    with pytest.raises(StopError):
        train(small_config, tmp_path / "run", cache_dir=cache_dir, on_step=stop_after(3))
    with pytest.raises(LabError, match="steps is 6 there, 7 here"):
        train(small_config.model_copy(update={"steps": 7}), tmp_path / "run", resume=True, cache_dir=cache_dir)


def test_a_truncated_checkpoint_is_named_and_the_one_before_is_used(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path
) -> None:
    train(small_config, tmp_path / "whole", cache_dir=cache_dir)
    with pytest.raises(StopError):
        train(small_config, tmp_path / "run", cache_dir=cache_dir, on_step=stop_after(5))
    last = tmp_path / "run" / "checkpoints" / "step-00000004.pt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="step-00000004"):
        train(small_config, tmp_path / "run", resume=True, cache_dir=cache_dir)
    assert_equal(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))
    assert log_without_times(tmp_path / "run") == log_without_times(tmp_path / "whole")


def test_changed_text_is_refused_on_resume(small_config: TrainConfig, tmp_path: Path, cache_dir: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words that are repeated over and over again\n" * 100)
    data = small_config.data.model_copy(update={"sources": (str(text),)})
    config = small_config.model_copy(update={"data": data})
    with pytest.raises(StopError):
        train(config, tmp_path / "run", cache_dir=cache_dir, on_step=stop_after(3))
    text.write_text("some other words that are repeated over and over again\n" * 100)
    with pytest.raises(LabError, match="trained on other text"):
        train(config, tmp_path / "run", resume=True, cache_dir=cache_dir)


def test_a_diverged_run_ends_and_its_files_are_json(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spectrim.lab.train.evaluate", lambda *_: math.nan)
    result = train(small_config, tmp_path / "run", cache_dir=cache_dir)
    assert result.final_loss is None
    assert result.curve.val_loss == (None, None, None)
    assert read_log(tmp_path / "run" / "log.jsonl")[-1]["val_loss"] is None
    assert json.loads((tmp_path / "run" / "result.json").read_text())["final_loss"] is None
    assert "NaN" not in (tmp_path / "run" / "log.jsonl").read_text()


def test_a_killed_process_is_resumed_bit_for_bit(small_config: TrainConfig, tmp_path: Path, cache_dir: Path) -> None:
    config = small_config.model_copy(update={"steps": 200, "checkpoint_every": 5})
    config_file = tmp_path / "config.toml"
    config_file.write_text(config.to_toml(), encoding="utf-8")
    command = [sys.executable, "-m", "spectrim", "train", "--config", str(config_file), "--cache-dir", str(cache_dir)]
    command += ["--out", str(tmp_path / "killed")]
    # One thread as in this process: how a sum is split among threads decides its rounding.
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    log = tmp_path / "killed" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_bytes().count(b"\n") > 12):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "result.json").exists()
    train(config, tmp_path / "killed", resume=True, cache_dir=cache_dir)
    train(config, tmp_path / "whole", cache_dir=cache_dir)
    assert_equal(final_state(tmp_path / "killed", 200), final_state(tmp_path / "whole", 200))
    assert log_without_times(tmp_path / "killed") == log_without_times(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob("*.partial"))
