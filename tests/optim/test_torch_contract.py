"""What torch asks of its own optimizers, asked of ours: its harness's inputs, errors and schedulers, and its
checkpoints."""

import copy
import inspect
import math

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.testing._internal import common_optimizers as harness

import spectrim

CLASSES = [
    spectrim.AdamW,
    spectrim.AdEMAMix,
    spectrim.MARS,
    spectrim.Momentum,
    spectrim.Muon,
    spectrim.Signum,
    spectrim.Spectra,
]
every_class = pytest.mark.parametrize("optimizer_class", CLASSES)
TORCH_ADAMW = next(info for info in harness.optim_db if info.optim_cls is torch.optim.AdamW)


def inputs(optimizer_class):
    """The harness's inputs for AdamW that the class has options for."""
    takes = {*inspect.signature(optimizer_class.__init__).parameters, "maximize"}
    return [case for case in TORCH_ADAMW.optim_inputs_func("cpu", torch.float32) if set(case.kwargs) <= takes]


CASES = [(optimizer_class, case) for optimizer_class in CLASSES for case in inputs(optimizer_class)]


def problem(dtype=torch.float32):
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(10, 5, dtype=dtype)), nn.Parameter(torch.randn(10, dtype=dtype))
    x = torch.randn(5, dtype=dtype)
    return [weight, bias], lambda: (weight @ x + bias).square().sum()


def run(optimizer, loss, steps, after=lambda: None):
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        after()
    return loss().item()


def test_the_harness_has_inputs_for_every_class():
    assert {optimizer_class for optimizer_class, _ in CASES} == set(CLASSES)


@pytest.mark.parametrize(
    ("optimizer_class", "case"), CASES, ids=lambda value: getattr(value, "desc", None) or value.__name__
)
@pytest.mark.parametrize("schedulers", [(), *TORCH_ADAMW.scheduler_inputs], ids=lambda s: str(len(s)))
def test_the_loop_goes_the_right_way_under_schedulers(optimizer_class, case, schedulers):
    params, loss = problem()
    kwargs = {**case.kwargs, "lr": case.kwargs.get("lr", 1e-3)}
    optimizer = optimizer_class(params, **kwargs)
    made = [make(optimizer) for make in schedulers]
    first = loss().item()

    def after():
        for scheduler in made:
            plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(loss().item()) if plateau else scheduler.step()

    last = run(optimizer, loss, 20, after)
    assert last > first if case.kwargs.get("maximize") else last < first


@pytest.mark.parametrize("case", inputs(spectrim.AdamW), ids=lambda case: case.desc)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_adamw_is_torch_adamw_on_every_input(case, dtype):
    (mine, my_loss), (its, its_loss) = problem(dtype), problem(dtype)
    run(spectrim.AdamW(mine, **case.kwargs), my_loss, 30)
    run(torch.optim.AdamW(its, **case.kwargs), its_loss, 30)
    for ours, theirs in zip(mine, its, strict=True):
        torch.testing.assert_close(ours, theirs)


@every_class
@pytest.mark.parametrize(
    "case",
    harness.get_error_inputs_for_all_optims("cpu", torch.float32),
    ids=lambda case: case.optimizer_error_input.desc,
)
def test_what_torch_refuses_is_refused(optimizer_class, case):
    given = case.optimizer_error_input
    params = given.params or [nn.Parameter(torch.zeros(2))]
    if issubclass(case.error_type, Warning):
        with pytest.warns(case.error_type):
            optimizer_class(params, **given.kwargs)
    else:
        with pytest.raises(case.error_type):
            optimizer_class(params, **given.kwargs)


@every_class
def test_grad_scaler_unscales_and_skips_an_overflow(optimizer_class):
    params, loss = problem()
    twins, twin_loss = problem()
    optimizer, twin = optimizer_class(params, lr=1e-3), optimizer_class(twins, lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss() * (math.inf if step == 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if step != 2:
            run(twin, twin_loss, 1)
    for mine, its in zip(params, twins, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


@every_class
def test_accumulated_gradients_step_as_their_sum(optimizer_class):
    params, loss = problem()
    twins, twin_loss = problem()
    optimizer, twin = optimizer_class(params, lr=1e-3), optimizer_class(twins, lr=1e-3)
    for _ in range(2):
        (0.5 * loss()).backward()
    optimizer.step()
    twin_loss().backward()
    twin.step()
    for mine, its in zip(params, twins, strict=True):
        torch.testing.assert_close(mine, its)


@every_class
@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoint_functions_carry_a_run_on(optimizer_class, flatten):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 12), nn.Linear(12, 9), nn.Linear(9, 12))
        return model, optimizer_class(spectrim.param_groups(model), lr=1e-3)

    def train(model, optimizer, steps, first=0):
        for step in range(first, first + steps):
            tokens = torch.randint(7, (16,), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(tokens).square().mean().backward()
            optimizer.step()

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = build()
    train(model, optimizer, 3)
    # A copy: torch's state dicts hold the state itself.
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    other, resumed = build()
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, resumed, saved, options=options)
    train(model, optimizer, 3, first=3)
    train(other, resumed, 3, first=3)
    for mine, its in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, its)


@every_class
def test_names_of_parameters_are_kept(optimizer_class):
    model = nn.Linear(4, 6)
    optimizer = optimizer_class(model.named_parameters(), lr=1e-3)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
