"""The Trainer of transformers with a recipe's optimizer: roles, schedules, logs, checkpoints, adapters and ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback

import spectrim
import trainer_cases as cases
from spectrim.integrations.transformers import LearningRates, OptimizerFactory, SpectralMonitor

CLIPPED = {"name": "adamw+clip", "weight_decay": 0.1, "embedding_lr": 0.5}


def watched(folder: Path, **options: Any) -> transformers.Trainer:
    trainer = cases.trainer(folder, CLIPPED, **options)
    LearningRates(trainer)
    SpectralMonitor(trainer, every=2, out=folder / "monitor.jsonl", names="*h.0.mlp.c_fc*")
    return trainer


def lines(trainer: transformers.Trainer) -> list[dict[str, Any]]:
    """The log lines of training steps, without times."""
    timed = ("spectral/ms",)
    return [
        {key: value for key, value in line.items() if key not in timed}
        for line in trainer.state.log_history
        if "loss" in line
    ]


def column(trainer: transformers.Trainer, key: str) -> list[float]:
    return [line[key] for line in lines(trainer) if key in line]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> transformers.Trainer:
    """Six steps with both callbacks; checkpoints after the third and the sixth."""
    trainer = watched(tmp_path_factory.mktemp("run"))
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def torch_run(tmp_path_factory: pytest.TempPathFactory) -> transformers.Trainer:
    """Six steps of the Trainer's own AdamW."""
    trainer = cases.trainer(tmp_path_factory.mktemp("torch"), learning_rate=cases.LR, weight_decay=0.1)
    trainer.train()
    return trainer


# -- The optimizer -----------------------------------------------------------------------------------------------------


def test_the_trainer_moves_a_model_as_a_plain_loop_does_with_the_same_rates(run):
    net = cases.model()
    optimizer = spectrim.create(**CLIPPED, lr=cases.LR, model_or_params=net)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, 6)
    torch.manual_seed(run.args.seed)
    for batch, _ in zip(run.get_train_dataloader(), range(6), strict=False):
        net(**batch).loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    after, started = cases.weights(run.model), cases.weights(cases.model())
    for name, weight in cases.weights(net).items():
        # Where biases of keys have gradients that are rounding errors.
        assert (after[name] - weight).norm() <= 1e-3 * (weight - started[name]).norm(), name


def test_every_parameter_keeps_the_role_that_it_has_in_the_model(run):
    expected = spectrim.describe(spectrim.create(**CLIPPED, lr=cases.LR, model_or_params=cases.model())).rows
    found = spectrim.describe(run.optimizer.optimizer).rows
    assert [(row.name, row.role, row.matrix, row.rule) for row in found] == [
        (row.name, row.role, row.matrix, row.rule) for row in expected
    ]
    assert {row.role for row in found} == {"matrix", "embedding", "vector"}


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"name": "adamw+clop", "lr": 1e-2}, ValueError, "unknown recipe 'adamw.clop'"),
        ({"name": "muon", "lr": 1e-2, "optim_bits": 8}, TypeError, "unexpected option 'optim_bits'"),
        ({"name": "muon"}, TypeError, "'lr'"),
    ],
)
def test_what_no_recipe_takes_is_an_error_before_training(keywords, error, message, tmp_path):
    arguments = cases.arguments(tmp_path)
    trainer = transformers.Trainer(
        cases.model(), arguments, train_dataset=cases.Tokens(), optimizer_cls_and_kwargs=(OptimizerFactory, keywords)
    )
    with pytest.raises(error, match=message):
        trainer.train()


def test_adapters_are_trained_as_matrices_and_what_is_frozen_stays(tmp_path):
    config = LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    net = get_peft_model(cases.model(), config)
    before = cases.weights(net)
    trainer = cases.trainer(tmp_path, {"name": "spectra+clip"}, net=net)
    trainer.train()
    trained = {row.name: row.role for row in spectrim.describe(trainer.optimizer.optimizer).rows}
    assert set(trained) == {name for name in before if "lora_" in name}
    assert set(trained.values()) == {"matrix"}
    for name, weight in cases.weights(net).items():
        assert torch.equal(weight, before[name]) == (name not in trained), name
    again = get_peft_model(cases.model(), config)
    resumed = cases.trainer(tmp_path, {"name": "spectra+clip"}, net=again)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, weight in cases.weights(again).items():
        assert torch.equal(weight, cases.weights(net)[name]), name


def test_a_compiled_model_moves_as_an_eager_one(run, tmp_path):
    trainer = watched(tmp_path, torch_compile=True, torch_compile_backend="eager")
    trainer.train()
    assert [line["loss"] for line in lines(trainer)] == pytest.approx([line["loss"] for line in lines(run)], rel=1e-5)
    name = "spectral/transformer.h.0.mlp.c_fc.weight/gradient_norm"
    assert [line[name] for line in lines(trainer)[1::2]] == pytest.approx(
        [line[name] for line in lines(run)[1::2]], rel=1e-4
    )


def test_accumulated_micro_batches_are_one_step_and_one_measurement(run, tmp_path):
    trainer = watched(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer.train()
    assert [line["step"] for line in lines(trainer)] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "spectral/gradient_norm", "spectral/update_norm", "spectral/step"):
        assert column(trainer, key) == pytest.approx(column(run, key), rel=1e-3), key


# -- Learning rates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "shares"),
    [
        ("linear", {}, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("constant_with_warmup", {"warmup_steps": 2}, [0, 0.5, 1, 1, 1, 1]),
        ("polynomial", {"lr_scheduler_kwargs": {"power": 2.0, "lr_end": 0.0}}, [(1 - k / 6) ** 2 for k in range(6)]),
        ("reduce_lr_on_plateau", {"eval_strategy": "steps", "eval_steps": 6}, [1] * 6),
    ],
)
def test_rates_are_logged_by_role_and_follow_the_schedule(kind, options, shares, tmp_path):
    overrides = {"*c_fc.weight": {"lr_factor": 2.0}}
    trainer = cases.trainer(tmp_path, {**CLIPPED, "overrides": overrides}, lr_scheduler_type=kind, **options)
    LearningRates(trainer)
    trainer.train()
    rates = {
        key: [line[key] for line in lines(trainer)] for key in lines(trainer)[0] if key.startswith("learning_rate/")
    }
    factors = {"embedding": 0.5, "vector": 1, "matrix/0": 1, "matrix/1": 2}
    assert set(rates) == {f"learning_rate/{role}" for role in factors}
    for role, factor in factors.items():
        expected = [cases.LR * factor * share for share in shares]
        assert rates[f"learning_rate/{role}"] == pytest.approx(expected, abs=1e-9), role


def test_what_reports_a_line_has_the_numbers_of_callbacks_in_it(tmp_path, monkeypatch):
    reported: list[dict[str, Any]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            reported.append(dict(logs))

    monkeypatch.setattr(transformers.trainer, "get_reporting_integration_callbacks", lambda report_to: [Reporter])
    trainer = watched(tmp_path, logging_steps=6, eval_strategy="steps", eval_steps=3)
    trainer.train()
    trained = [line for line in reported if "loss" in line]
    assert [sorted(line) for line in trained] == [sorted(set(line) - {"step"}) for line in logged_by(trainer)]
    # A measured step is always logged, and its line says what that step was.
    assert [line["spectral/step"] for line in trained] == [2, 4, 6]
    assert all("learning_rate/matrix" in line for line in trained)
    assert not any(
        key.startswith(("spectral", "learning_rate/")) for line in reported if "loss" not in line for key in line
    )


def logged_by(trainer: transformers.Trainer) -> list[dict[str, Any]]:
    return [line for line in trainer.state.log_history if "loss" in line]


# -- The monitor -------------------------------------------------------------------------------------------------------


def test_the_log_has_medians_over_matrices_and_single_matrices_that_were_asked_for(run):
    records = [json.loads(line) for line in (Path(run.args.output_dir) / "monitor.jsonl").read_text().splitlines()]
    measured = [record for record in records if record["parameters"]]
    assert [record["step"] for record in measured] == [2, 4, 6]
    for record, line in zip(measured, (line for line in lines(run) if "spectral/step" in line), strict=True):
        assert line["step"] == record["step"]
        for quantity in ("gradient_norm", "update_spike_share", "weight_stable_rank"):
            values = sorted(entry[quantity] for entry in record["parameters"].values())
            assert values[(len(values) - 1) // 2] <= line[f"spectral/{quantity}"] <= values[len(values) // 2]
            asked = line[f"spectral/transformer.h.0.mlp.c_fc.weight/{quantity}"]
            assert asked == record["parameters"]["transformer.h.0.mlp.c_fc.weight"][quantity]
    single = {key.split("/")[1] for line in lines(run) for key in line if key.startswith("spectral/transformer")}
    assert single == {"transformer.h.0.mlp.c_fc.weight"}


def test_training_is_the_same_to_the_bit_without_callbacks(run, tmp_path):
    trainer = cases.trainer(tmp_path, CLIPPED)
    trainer.train()
    expected = cases.weights(run.model)
    for name, weight in cases.weights(trainer.model).items():
        assert torch.equal(weight, expected[name]), name


def test_a_callback_is_added_once(tmp_path):
    trainer = cases.trainer(tmp_path, CLIPPED)
    monitor = SpectralMonitor(trainer)
    with pytest.raises(ValueError, match="has a SpectralMonitor already"):
        SpectralMonitor(trainer)
    trainer.add_callback(monitor)
    with pytest.raises(ValueError, match="added twice"):
        trainer.train()


@pytest.mark.parametrize(
    "options",
    [
        {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 16},
        {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "loss"},
    ],
    ids=["epoch", "best"],
)
def test_whatever_decides_to_save_saves_the_monitor(options, tmp_path):
    trainer = watched(tmp_path, **options)
    trainer.train()
    for checkpoint in tmp_path.glob("checkpoint-*"):
        saved = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"][
            "spectrim.SpectralMonitor"
        ]
        assert saved["steps_taken"] == int(checkpoint.name.removeprefix("checkpoint-"))
        counts = {trend["count"] for trend in saved["alarm"].values()}
        assert counts == {saved["steps_taken"]}, "a trend over every step until the checkpoint"


# -- Checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_is_the_run_that_was_not_interrupted_to_the_bit(restore, run, tmp_path):
    folder = Path(run.args.output_dir)
    records = (folder / "monitor.jsonl").read_text()
    trainer = watched(folder, restore_callback_states_from_checkpoint=restore)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    expected, state = cases.weights(run.model), cases.state(run.optimizer)
    for name, weight in cases.weights(trainer.model).items():
        assert torch.equal(weight, expected[name]), name
    resumed = cases.state(trainer.optimizer)
    assert state.keys() == resumed.keys()
    for key, value in resumed.items():
        assert torch.equal(value, state[key]), key
    assert trainer.optimizer.state_dict()["param_groups"] == run.optimizer.state_dict()["param_groups"]
    assert lines(trainer) == lines(run)
    timeless = [
        [{**json.loads(line), "ms": 0} for line in text.splitlines()]
        for text in (records, (folder / "monitor.jsonl").read_text())
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_run_of_the_trainers_own_adamw_goes_on_as_it_would_have(optim, torch_run, tmp_path):
    trainer = cases.trainer(tmp_path, {"name": "adamw", "lr": 1.0, "weight_decay": 0.3})
    LearningRates(trainer)
    with pytest.warns(UserWarning, match="the Trainer's own AdamW"):
        trainer.train(resume_from_checkpoint=str(Path(torch_run.args.output_dir) / "checkpoint-3"))
    before, after = cases.weights(cases.model()), cases.weights(torch_run.model)
    for name, weight in cases.weights(trainer.model).items():
        assert (weight - after[name]).norm() <= 1e-5 * (after[name] - before[name]).norm(), name
    assert [line["learning_rate"] for line in lines(trainer)] == [line["learning_rate"] for line in lines(torch_run)]


@pytest.mark.parametrize(
    ("key", "message"),
    [("exp_avg", r"of transformer.wte.weight has shape \(3, 3\)"), ("state1", "'state1' of transformer.wte.weight")],
    ids=["another model", "8 bits"],
)
def test_state_that_does_not_fit_is_refused_by_the_name_of_its_parameter(key, message, torch_run):
    optimizer = OptimizerFactory()(cases.model(), name="adamw", lr=1.0)
    saved = torch.load(Path(torch_run.args.output_dir) / "checkpoint-3" / "optimizer.pt", weights_only=True)
    first = saved["param_groups"][0]["params"][0]
    saved["state"][first][key] = torch.zeros(3, 3)
    with pytest.warns(UserWarning, match="AdamW"), pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)


# -- Ranks -------------------------------------------------------------------------------------------------------------


def ranks() -> list[dict[str, Any]]:
    return [found["trainer"] for found in cases.two_ranks()]


def test_two_ranks_of_fsdp2_move_a_model_as_one_process_does(tmp_path):
    trainer = cases.trainer(tmp_path, {"name": "adamw+clip"})
    SpectralMonitor(trainer, every=2)
    trainer.train()
    before, after = cases.weights(cases.model()), cases.weights(trainer.model)
    for found in ranks():
        assert found["run"]["sharded"]
        for name, weight in found["run"]["weights"].items():
            assert (weight - after[name]).norm() <= 1e-3 * (after[name] - before[name]).norm(), name
    for key in ("loss", "spectral/step", "spectral/gradient_norm", "spectral/update_stable_rank"):
        logged = [line[key] for line in ranks()[0]["run"]["logs"] if "loss" in line and key in line]
        assert logged == pytest.approx(column(trainer, key), rel=1e-3), key


def test_two_ranks_of_fsdp2_resume_to_the_bit():
    for found in ranks():
        for kind in ("weights", "state"):
            assert found["run"][kind].keys() == found["resumed"][kind].keys()
            for key, value in found["run"][kind].items():
                assert torch.equal(value, found["resumed"][kind][key]), key
    run, resumed = (
        [{**line, "spectral/ms": 0} for line in ranks()[0][kind]["logs"][:-1]] for kind in ("run", "resumed")
    )
    assert run == resumed
