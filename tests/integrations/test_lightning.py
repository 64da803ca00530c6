"""Lightning's own Trainer with spectrim's optimizers and monitor, at tiny size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import spectrim
import worlds

pytest.importorskip("lightning")

from lightning.pytorch.callbacks import LearningRateMonitor

import lightning_workers as workers
from spectrim.integrations.lightning import SpectralMonitor

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*lr_scheduler.step.*:UserWarning")


def test_training_is_that_of_a_plain_loop() -> None:
    model = workers.Model("muon")
    workers.fit(model, steps=4, gradient_clip_val=0.5)
    plain = workers.Model("muon")
    made = plain.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    for index in range(4):
        optimizer.zero_grad()
        plain.training_step(torch.tensor(0), index).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        schedule.step()
    for (name, got), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(got, expected), name


def test_learning_rates_are_logged_by_role() -> None:
    logger = workers.Kept()
    workers.fit(workers.Model(), steps=2, callbacks=[LearningRateMonitor()], logger=logger)
    rates = {name: value for _, line in logger.lines for name, value in line.items() if name.startswith("lr-")}
    assert rates == pytest.approx(
        {
            "lr-AdamW/embedding": 6.25e-3,
            "lr-AdamW/matrix": 6.25e-3,
            "lr-AdamW/vector": 6.25e-3,
            "lr-AdamW/head": 3.125e-3,
        }
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_goes_on_exactly_and_so_does_its_monitor(tmp_path: Path, accumulate: int) -> None:
    def run(steps: int, checkpoint: str | None = None) -> tuple[Any, Any, workers.Kept]:
        logger, model = workers.Kept(), workers.Model("spectra")
        watch = SpectralMonitor(every=2, out=tmp_path / f"{steps}.jsonl" if checkpoint is None else None)
        options = {"logger": logger, "accumulate_grad_batches": accumulate, "callbacks": [watch]}
        return model, workers.fit(model, steps=steps, checkpoint=checkpoint, **options), logger

    _, trainer, _ = run(3)
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    # What is in a checkpoint is plain.
    torch.load(tmp_path / "three.ckpt", weights_only=True)
    through, _, logged = run(6)
    resumed, _, logged_after = run(6, str(tmp_path / "three.ckpt"))
    for (name, got), expected in zip(resumed.named_parameters(), through.parameters(), strict=True):
        assert torch.equal(got, expected), name

    def measured(logger: workers.Kept) -> list[tuple[int | None, dict[str, float]]]:
        lines = [(step, line) for step, line in logger.lines if "monitor/ms" in line]
        return [(step, {key: value for key, value in line.items() if key != "monitor/ms"}) for step, line in lines]

    assert [step for step, _ in measured(logged)] == [1, 3, 5]
    assert measured(logged_after) == measured(logged)[1:]
    assert "outside of layers/hidden.weight/gradient_norm" in measured(logged)[0][1]
    assert len((tmp_path / "6.jsonl").read_text().splitlines()) == 3


def test_the_monitor_begins_anew_with_a_run_and_lets_go_when_one_fails() -> None:
    class Fails(workers.Model):
        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            if index == 1:
                raise RuntimeError("failed on purpose")
            return super().training_step(batch, index)

    watch = SpectralMonitor(every=1)
    for _ in range(2):
        # One run after another, each from its beginning.
        trainer = workers.fit(workers.Model(), steps=2, callbacks=[watch])
        assert watch.state_dict()["monitors"][0]["steps_taken"] == trainer.global_step == 2
    with pytest.raises(RuntimeError, match="on purpose"):
        workers.fit(Fails(), steps=4, callbacks=[watch])
    assert watch.monitors == []


def test_two_ranks_of_fsdp2_resume_exactly_and_step_as_one_process_does(tmp_path: Path) -> None:
    first, second = worlds.run(2, workers.resume_sharded, str(tmp_path))
    assert first["kinds"] == {"DTensor"}
    assert first["steps"] == {6}
    alone = workers.Model()
    workers.fit(alone, steps=6)
    for name, value in workers.whole(alone).items():
        torch.testing.assert_close(first["through"][name], value, rtol=1e-4, atol=1e-5)
    for sharded in (True, False):
        weights, measured = first[f"resumed, sharded {sharded}"]
        others, nothing = second[f"resumed, sharded {sharded}"]
        for name, value in first["through"].items():
            assert torch.equal(weights[name], value), name
            assert torch.equal(others[name], value), name
        assert (measured, nothing) == ([3, 5], [])


def cli(model: type[workers.Model], *arguments: str) -> Any:
    pytest.importorskip("docstring_parser")  # of jsonargparse's extra "signatures"
    from lightning.pytorch.cli import LightningCLI

    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_steps": 1}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False}
    return LightningCLI(model, trainer_defaults=quiet, run=False, args=list(arguments))


def test_the_command_line_takes_an_optimizer_with_its_options_and_roles_if_the_model_asks() -> None:
    options = ["lr=2e-3", "betas=[0.9,0.95]", "clip=auto", "total_steps=10", "clip_decay=linear"]
    made = cli(workers.Told, "--model.optimizer=spectrim.AdamW", *(f"--model.optimizer.{option}" for option in options))
    optimizer = made.model.configure_optimizers()
    assert isinstance(optimizer, spectrim.AdamW)
    assert [group["role"] for group in optimizer.param_groups] == ["embedding", "matrix", "vector", "head"]
    for group in optimizer.param_groups:
        assert (group["lr"], group["clip"], group["betas"], group["total_steps"]) == (2e-3, "auto", (0.9, 0.95), 10)
    with pytest.raises(SystemExit):
        cli(workers.Told, "--model.optimizer=spectrim.AdamW", "--model.optimizer.clipp=auto")


def test_the_command_lines_own_optimizer_is_made_without_names_and_says_so() -> None:
    with pytest.warns(UserWarning, match=r"embeddings or heads|as hidden"):
        made = cli(workers.Model, "--optimizer=spectrim.Muon", "--optimizer.lr=1e-3")
    (group,) = made.model.configure_optimizers().param_groups
    assert (group["lr"], group.get("role")) == (1e-3, None)
