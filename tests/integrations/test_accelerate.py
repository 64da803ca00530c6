"""Optimizers in accelerate: prepared, accumulated, scaled, saved and loaded, on one process and on two."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.utils.data import DataLoader

import spectrim
import trainer_cases as cases


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True, gradient_accumulation_steps=2)


def plain(until: int) -> dict[str, torch.Tensor]:
    """The weights that a plain loop over the same micro-batches gives."""
    net = cases.model()
    optimizer = spectrim.create("adamw+clip", net, lr=cases.LR)
    for number, batch in enumerate(list(DataLoader(cases.Tokens(), 4))[: 2 * until]):
        (net(**batch).loss / 2).backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    return cases.weights(net)


def test_a_prepared_optimizer_takes_the_steps_of_a_plain_loop(accelerator):
    found, _ = cases.steps(accelerator, 4)
    for name, weight in plain(4).items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("recipe", ["adamw+clip", "spectra", "muon"])
def test_a_checkpoint_that_is_loaded_before_the_first_step_goes_on_to_the_bit(recipe, accelerator, tmp_path):
    weights, state = cases.steps(accelerator, 4, recipe=recipe)
    cases.steps(accelerator, 2, recipe=recipe, save=tmp_path)
    again, its_state = cases.steps(accelerator, 4, recipe=recipe, load=tmp_path)
    assert state.keys() == its_state.keys()
    for mine, its in ((weights, again), (state, its_state)):
        for key, value in mine.items():
            assert torch.equal(value, its[key]), key


def test_a_prepared_scheduler_reaches_every_group(accelerator):
    net = cases.model()
    optimizer = spectrim.create("muon", net, lr=1e-2, embedding_lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    net, optimizer, scheduler = accelerator.prepare(net, optimizer, scheduler)
    for batch in list(DataLoader(cases.Tokens(), 4))[:4]:
        with accelerator.accumulate(net):
            accelerator.backward(net(**batch).loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    rates = [(group["role"], group["lr"]) for group in optimizer.param_groups]
    assert rates == [(role, pytest.approx(1e-2 / 3 * (0.5 if role == "embedding" else 1))) for role, _ in rates]


def test_the_monitor_counts_the_steps_that_are_taken(accelerator):
    net = cases.model()
    optimizer = spectrim.create("adamw+clip", net, lr=1e-2)
    net, optimizer = accelerator.prepare(net, optimizer)
    records: list[dict[str, Any]] = []
    with spectrim.SpectralMonitor(net, optimizer, every=1, out=records.append):
        for batch in list(DataLoader(cases.Tokens(), 4))[:6]:
            with accelerator.accumulate(net):
                accelerator.backward(net(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
    assert [record["step"] for record in records if record["parameters"]] == [1, 2, 3]


def test_the_monitors_state_is_in_checkpoints_once_it_is_registered(accelerator, tmp_path):
    net = nn.Linear(8, 8)
    net, optimizer = accelerator.prepare(net, spectrim.create("adamw+clip", net, lr=1e-2))
    with spectrim.SpectralMonitor(net, optimizer, out=None) as monitor:
        accelerator.register_for_checkpointing(monitor)
        for step in range(4):
            if step == 2:
                accelerator.save_state(str(tmp_path))
                saved = monitor.state_dict()
            net(torch.ones(2, 8)).square().sum().backward()
            optimizer.step()
        accelerator.load_state(str(tmp_path))
        assert monitor.state_dict() == saved
        assert saved["steps_taken"] == 2


def test_a_step_whose_scaled_gradients_overflow_moves_nothing(accelerator):
    net = nn.Linear(4, 4)
    optimizer = spectrim.create("adamw+clip", net, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    wrapped = AcceleratedOptimizer(optimizer, scaler=scaler)
    before = net.weight.detach().clone()
    for overflow in (True, False):
        scaler.scale(net(torch.ones(2, 4)).square().sum() * (float("inf") if overflow else 1.0)).backward()
        wrapped.step()
        wrapped.zero_grad()
        assert torch.equal(net.weight, before) == overflow
        assert not wrapped.step_was_skipped  # known on the device alone, as of torch's fused AdamW
    assert scaler.get_scale() == 4.0
    assert optimizer.state[net.weight]["step"] == 1


# -- Ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_two_ranks_of_fsdp2_step_as_one_process_and_resume_to_the_bit(kind):
    expected, before = plain(4), cases.weights(cases.model())
    for found in cases.two_ranks():
        (weights, state), (again, its_state) = found["accelerate"][kind]
        for name, weight in weights.items():
            assert (weight - expected[name]).norm() <= 1e-3 * (expected[name] - before[name]).norm(), name
            assert torch.equal(again[name], weight), name
        assert state.keys() == its_state.keys()
        for key, value in state.items():
            assert torch.equal(value, its_state[key]), key
