import json
import math
from pathlib import Path

import pytest
import torch
import transformers

from lab_runs import StopError, assert_equal, final_state, log_without_times, stop_after
from spectrim.lab.config import TrainConfig
from spectrim.lab.errors import LabError
from spectrim.lab.logging.log import read_log
from spectrim.lab.logging.run_result import RunResult
from spectrim.lab.settings import read_toml
from spectrim.lab.training.evaluate import Evaluation
from spectrim.lab.training.loop import clip_gradient
from spectrim.lab.training.run import prepare, train


# In the step of the first checkpoint, before that is written, and one step after the second checkpoint.
@pytest.mark.parametrize(
    ("recipe", "stop"),
    [("adamw", 2), *((r, 5) for r in ("adamw", "adamw+shrink+clip", "mars+preclip+clip", "spectra", "muon"))],
)
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


def test_dropout_goes_on_where_it_was(small_config: TrainConfig, tmp_path: Path, cache_dir: Path) -> None:
    model = small_config.model.model_copy(update={"overrides": {"attention_dropout": 0.5}})
    config = small_config.model_copy(update={"model": model})
    train(small_config, tmp_path / "without", cache_dir=cache_dir)
    train(config, tmp_path / "whole", cache_dir=cache_dir)
    assert losses(tmp_path / "whole") != losses(tmp_path / "without")
    with pytest.raises(StopError):
        train(config, tmp_path / "parts", cache_dir=cache_dir, on_step=stop_after(5))
    train(config, tmp_path / "parts", resume=True, cache_dir=cache_dir)
    assert_equal(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))
    assert log_without_times(tmp_path / "parts") == log_without_times(tmp_path / "whole")


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
    assert 0 <= result.state_bytes - 8 * result.parameters <= 8 * len(weights)


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
    diverged = Evaluation(loss=math.nan, by_frequency={"1-300": math.nan})
    monkeypatch.setattr("spectrim.lab.training.loop.evaluate", lambda *_, **__: diverged)
    result = train(small_config, tmp_path / "run", cache_dir=cache_dir)
    assert result.final_loss is None
    assert result.curve.val_loss == (None, None, None)
    assert read_log(tmp_path / "run" / "log.jsonl")[-1]["val_loss"] is None
    assert json.loads((tmp_path / "run" / "result.json").read_text())["final_loss"] is None
    assert "NaN" not in (tmp_path / "run" / "log.jsonl").read_text()


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_log(folder / "log.jsonl")]


def test_micro_batches_give_the_loss_curve_of_the_whole_batch(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path
) -> None:
    data = small_config.data.model_copy(update={"batch_size": 4})
    config = small_config.model_copy(update={"data": data})
    train(config, tmp_path / "whole", cache_dir=cache_dir)
    for parts in (2, 4):
        split = config.model_copy(update={"accumulate": parts})
        train(split, tmp_path / str(parts), cache_dir=cache_dir)
        assert losses(tmp_path / str(parts)) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
        norms = [
            [record["grad_norm"] for record in read_log(tmp_path / name / "log.jsonl")]
            for name in (str(parts), "whole")
        ]
        assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_bf16_rounds_the_model_and_keeps_weights_and_state_in_float32(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path
) -> None:
    train(small_config, tmp_path / "float32", cache_dir=cache_dir)
    train(small_config.model_copy(update={"precision": "bf16"}), tmp_path / "bf16", cache_dir=cache_dir)
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "float32"), rel=3e-3)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "float32")
    state = final_state(tmp_path / "bf16")
    kept = [*state["model"].values(), *(entry["exp_avg"] for entry in state["optimizer"]["state"].values())]
    assert {tensor.dtype for tensor in kept} == {torch.float32}


@pytest.mark.parametrize(("bound", "after"), [(0.0, 5.0), (2.0, 2.0), (7.0, 5.0)])
def test_the_gradient_is_clipped_to_its_bound_or_not_at_all(bound: float, after: float) -> None:
    model = torch.nn.Linear(1, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0]]), torch.tensor([4.0])
    assert float(clip_gradient(model, bound)) == 5.0
    assert math.hypot(float(model.weight.grad), float(model.bias.grad)) == pytest.approx(after, rel=1e-5)


def test_the_loss_by_frequency_is_logged_and_in_the_result(
    small_config: TrainConfig, tmp_path: Path, cache_dir: Path
) -> None:
    result = train(small_config, tmp_path / "run", cache_dir=cache_dir)
    evaluated = [record for record in read_log(tmp_path / "run" / "log.jsonl") if "val_loss" in record]
    assert result.val_loss_by_frequency == evaluated[-1]["val_loss_by_frequency"]
    for record in evaluated:
        known = [loss for loss in record["val_loss_by_frequency"].values() if loss is not None]
        assert min(known) <= record["val_loss"] <= max(known)


def test_two_processes_may_not_train_in_one_folder(small_config: TrainConfig, tmp_path: Path, cache_dir: Path) -> None:
    def second(_: object) -> None:
        train(small_config, tmp_path / "run", resume=True, cache_dir=cache_dir)

    with pytest.raises(LabError, match="another process is training in"):
        train(small_config, tmp_path / "run", cache_dir=cache_dir, on_step=second)
