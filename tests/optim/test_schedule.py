"""Thresholds over time against the sentences of the paper."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import spectrim
from spectrim.optim.rules.schedule import clip_threshold, peak_lr_of


def group(**values):
    defaults = {
        "lr_factor": 1.0,
        "clip": 5.0,
        "lr": 2e-3,
        "peak_lr": 2e-3,
        "largest_lr": 0.0,
        "steps_taken": 0,
        "warmup_steps": 0,
        "total_steps": 100,
    }
    return {**defaults, "clip_decay": "constant", "clip_decay_fraction": 0.1, "clip_final": 0.2, **values}


def test_threshold_times_learning_rate_is_constant_while_warming_up():
    for step in range(10):
        lr = 2e-3 * (step + 1) / 10
        assert clip_threshold(group(lr=lr, steps_taken=step, warmup_steps=10)) * lr == pytest.approx(0.01)


def test_the_threshold_is_constant_afterwards_whatever_the_learning_rate():
    assert {clip_threshold(group(lr=lr, steps_taken=50, warmup_steps=10)) for lr in (2e-3, 1e-3, 1e-5)} == {5.0}


def test_nothing_is_computed_at_learning_rate_zero_or_without_a_clip():
    assert clip_threshold(group(lr=0.0, peak_lr=0.0, clip="auto")) is None
    assert clip_threshold(group(clip=None)) is None


@pytest.mark.parametrize(
    ("decay", "halfway"),
    [("linear", 0.6), ("cosine", 0.6), ("sqrt", 1 - 0.8 * 0.5**0.5), ("square", 0.8), ("exponential", 0.2**0.5)],
)
def test_decay_runs_over_the_last_fraction_to_its_final_share(decay, halfway):
    shares = [clip_threshold(group(steps_taken=step, clip_decay=decay)) / 5.0 for step in (0, 90, 95, 100, 200)]
    assert shares == pytest.approx([1.0, 1.0, halfway, 0.2, 0.2])


def test_the_automatic_threshold_follows_the_peak():
    assert clip_threshold(group(clip="auto")) == pytest.approx(5.0)
    assert clip_threshold(group(clip="auto", lr=1e-4, peak_lr=1e-3, steps_taken=3)) == pytest.approx(10.0)


def test_the_automatic_threshold_is_one_for_all_groups_so_that_a_factor_moves_its_group_further():
    assert clip_threshold(group(clip="auto", lr=8e-3, peak_lr=8e-3, lr_factor=4.0)) == pytest.approx(5.0)


def test_an_automatic_threshold_without_a_peak_is_an_error_that_says_what_to_give():
    with pytest.raises(ValueError, match=r"peak_lr=0.0 with clip='auto' at lr=0.001"):
        clip_threshold(group(clip="auto", lr=1e-3, peak_lr=0.0))


# -- The peak, under schedulers ----------------------------------------------------------------------------------------


MAKERS = {
    "AdamW": lambda params, **options: spectrim.AdamW(params, weight_decay=0.0, clip="auto", **options),
    "Signum": lambda params, **options: spectrim.Signum(params, weight_decay=0.0, clip="auto", **options),
    "SpectralClipping": lambda params, **options: spectrim.SpectralClipping(
        torch.optim.AdamW(params, weight_decay=0.0, **{k: v for k, v in options.items() if k == "lr"}),
        **{k: v for k, v in options.items() if k != "lr"},
    ),
}
SCHEDULES = {
    "OneCycleLR far above": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
    "OneCycleLR far below": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-5, total_steps=10),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=1e-4, max_lr=0.1, step_size_up=4, cycle_momentum=False),
    "warm-up and cosine": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.01, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 6)], [4]
    ),
    "a factor above one": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1.0 + step),
}


def largest_move(optimizer, weight, steps=10, scheduler=None):
    moves = []
    for step in range(steps):
        before = weight.detach().clone()
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        if scheduler is not None and step < steps - 1:
            scheduler.step()
        moves.append(float(torch.linalg.matrix_norm((weight.detach() - before).double(), 2)))
    return max(moves)


def step_at(optimizer, weight, rates):
    for lr in rates:
        optimizer.param_groups[0]["lr"] = lr
        largest_move(optimizer, weight, steps=1)


@pytest.mark.filterwarnings("ignore:the learning rate rose")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("maker", MAKERS)
def test_no_scheduler_moves_a_matrix_further_than_the_automatic_bound(maker, schedule):
    weight = nn.Parameter(torch.zeros(8, 8))
    optimizer = MAKERS[maker]([weight], lr=1e-3)
    assert largest_move(optimizer, weight, scheduler=SCHEDULES[schedule](optimizer)) <= 0.01 * 1.001


@pytest.mark.parametrize("maker", MAKERS)
def test_the_peak_of_a_one_cycle_schedule_is_its_own_from_the_first_step(maker):
    weight = nn.Parameter(torch.zeros(8, 8))
    optimizer = MAKERS[maker]([weight], lr=1e-2)
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=1e-4, total_steps=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        largest_move(optimizer, weight, scheduler=scheduler)
    # Not what the optimizer was made with, which no step has had.
    assert peak_lr_of(optimizer.param_groups[0]) == pytest.approx(1e-4)


@pytest.mark.parametrize("maker", MAKERS)
def test_one_warning_tells_that_a_rate_passed_the_peak_that_was_known(maker):
    weight = nn.Parameter(torch.zeros(8, 8))
    optimizer = MAKERS[maker]([weight], lr=1e-3)
    with pytest.warns(UserWarning, match=r"0.004 in group 0, beyond 0.001") as caught:
        step_at(optimizer, weight, (5e-4, 1e-3, 4e-3, 8e-3, 1e-3))
    assert len(caught) == 1
    assert peak_lr_of(optimizer.param_groups[0]) == 8e-3


def test_a_stated_peak_stays_and_is_warned_of_once_where_the_rate_passes_it():
    weight = nn.Parameter(torch.zeros(8, 8))
    optimizer = spectrim.AdamW([weight], lr=1e-3, clip="auto", peak_lr=2e-3)
    with pytest.warns(UserWarning, match=r"beyond 0.002") as caught:
        step_at(optimizer, weight, (1e-3, 2e-3, 4e-3, 8e-3))
    assert len(caught) == 1
    assert peak_lr_of(optimizer.param_groups[0]) == 2e-3


def test_a_loop_that_sets_rates_by_hand_needs_no_scheduler():
    weight = nn.Parameter(torch.zeros(8, 8))
    optimizer = spectrim.AdamW([weight], lr=1e-3, clip="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step_at(optimizer, weight, (0.0, 5e-4, 1e-3, 5e-4, 0.0))
    assert clip_threshold({**optimizer.param_groups[0], "lr": 5e-4}) == pytest.approx(10.0)


def test_the_peak_survives_a_checkpoint():
    weight = nn.Parameter(torch.zeros(8, 8))
    optimizer = spectrim.AdamW([weight], lr=1e-3, clip="auto")
    optimizer.param_groups[0]["lr"] = 4e-3
    with pytest.warns(UserWarning, match="rose above"):
        largest_move(optimizer, weight, steps=1)
    again = spectrim.AdamW([weight], lr=1e-3, clip="auto")
    again.load_state_dict(optimizer.state_dict())
    assert peak_lr_of(again.param_groups[0]) == 4e-3


@pytest.mark.parametrize("name", ["Muon", "Spectra", "Signum", "Momentum"])
@pytest.mark.parametrize("schedule", ["OneCycleLR", "CyclicLR"])
def test_cyclic_schedulers_move_the_momentum_of_a_recipe_that_has_one(name, schedule):
    def cycled(optimizer):
        options = {"total_steps": 20} if schedule == "OneCycleLR" else {"base_lr": 1e-3, "step_size_up": 5}
        scheduler = getattr(lr_scheduler, schedule)(optimizer, max_lr=0.1, **options)
        seen = []
        for _ in range(8):
            seen.append(optimizer.param_groups[0]["momentum"])
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            scheduler.step()
        return seen

    optimizer = getattr(spectrim, name)([nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))], lr=1e-2)
    expected = cycled(torch.optim.SGD([nn.Parameter(torch.ones(4, 4))], lr=1e-2, momentum=0.95))
    assert cycled(optimizer) == expected
    assert len(set(expected)) > 4
    # The plain AdamW of vectors keeps its own numbers.
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_a_group_added_to_a_copy_has_the_betas_that_were_given():
    optimizer = copy.deepcopy(spectrim.Muon([nn.Parameter(torch.ones(4, 4))], betas=(0.8, 0.95)))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4))]})
    assert optimizer.param_groups[1]["betas"] == (0.8, 0.95)


# -- The factor on a group's rate --------------------------------------------------------------------------------------


def timm_rates(optimizer):
    """What a scheduler of timm does: the rates that it found, times ``lr_scale`` where a group has one."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * group.get("lr_scale", 1.0)
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("maker", MAKERS)
def test_the_lr_scale_of_timm_acts_once(maker):
    layers = [nn.Parameter(torch.ones(8, 8)) for _ in range(2)]

    def groups():
        return [{"params": [layers[0]], "lr_scale": 0.1}, {"params": [layers[1]], "lr_scale": 1.0}]

    optimizer = MAKERS[maker](groups(), lr=1e-2)
    assert timm_rates(optimizer) == timm_rates(torch.optim.AdamW(groups(), lr=1e-2))
    assert [group["lr_scale"] for group in optimizer.param_groups] == [0.1, 1.0]


@pytest.mark.parametrize("maker", MAKERS)
def test_the_factor_of_embeddings_survives_a_scheduler_of_timm(maker):
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8))
    optimizer = MAKERS[maker](spectrim.param_groups(model, embedding_lr=8.0), lr=1e-2)
    assert timm_rates(optimizer)[0] == pytest.approx(0.08)
    assert "lr_scale" not in optimizer.param_groups[0]


@pytest.mark.parametrize("maker", MAKERS)
def test_a_checkpoint_in_which_the_factor_had_its_old_name_is_understood(maker):
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8))
    saved = MAKERS[maker](spectrim.param_groups(model, embedding_lr=8.0), lr=1e-2).state_dict()
    for group in saved["param_groups"]:
        group["lr_scale"] = group.pop("lr_factor")
        del group["first_lr"]
    optimizer = MAKERS[maker](spectrim.param_groups(model), lr=1e-2)
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["lr_factor"], group["lr"]) == (8.0, 0.08)
    assert "lr_scale" not in group
    assert "first_lr" in group
