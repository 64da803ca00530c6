"""Thresholds over time against the sentences of the paper."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import spectrim
from spectrim.optim.rules.schedule import clip_threshold, peak_lr_of, pre_clip_threshold


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
    defaults |= {"pre_clip": None, "pre_clip_decay": "constant", "pre_clip_final": 0.1}
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


@pytest.mark.parametrize("decay", ["linear", "cosine", "sqrt", "square"])
def test_a_threshold_may_decay_to_zero_but_stays_a_number_that_can_be_divided_by(decay):
    options = {"clip_decay": decay, "clip_final": 0.0, "clip_decay_fraction": 0.2}
    found = [clip_threshold(group(steps_taken=step, **options)) / 5.0 for step in (80, 90, 100)]
    halfway = {"linear": 0.5, "cosine": 0.5, "sqrt": 1 - 0.5**0.5, "square": 0.75}[decay]
    assert found == pytest.approx([1.0, halfway, 0.0], abs=2e-6)
    assert found[-1] > 0
    on_device = [clip_threshold(group(**options), torch.tensor(float(step))) / 5.0 for step in (80, 90, 100)]
    assert [float(share) for share in on_device] == pytest.approx(found, rel=1e-4)


def test_a_run_whose_threshold_decays_to_zero_ends_in_steps_of_nothing():
    weight = nn.Parameter(torch.zeros(8, 12))
    options = {"clip": "auto", "clip_decay": "sqrt", "clip_decay_fraction": 0.2, "clip_final": 0.0}
    optimizer = spectrim.AdamW([weight], lr=1e-2, weight_decay=0.0, total_steps=10, **options)
    moves = [largest_move(optimizer, weight, steps=1) for _ in range(12)]
    expected = [0.01] * 9 + [0.01 * (1 - 0.5**0.5)] + [0.0] * 2
    assert all(move <= bound * 1.001 + 1e-7 for move, bound in zip(moves, expected, strict=True))
    assert moves[9] > 0.2 * expected[9]
    assert weight.isfinite().all()


def test_an_exponential_curve_cannot_end_at_zero():
    with pytest.raises(ValueError, match=r"clip_final=0.* above 0 with clip_decay='exponential'"):
        spectrim.AdamW([nn.Parameter(torch.zeros(2, 2))], clip_decay="exponential", clip_final=0, total_steps=9)


def test_the_automatic_threshold_follows_the_peak():
    assert clip_threshold(group(clip="auto")) == pytest.approx(5.0)
    assert clip_threshold(group(clip="auto", lr=1e-4, peak_lr=1e-3, steps_taken=3)) == pytest.approx(10.0)


def test_the_automatic_threshold_is_one_for_all_groups_so_that_a_factor_moves_its_group_further():
    assert clip_threshold(group(clip="auto", lr=8e-3, peak_lr=8e-3, lr_factor=4.0)) == pytest.approx(5.0)


def test_an_automatic_threshold_without_a_peak_is_an_error_that_says_what_to_give():
    with pytest.raises(ValueError, match=r"peak_lr=0.0 with clip='auto' at lr=0.001"):
        clip_threshold(group(clip="auto", lr=1e-3, peak_lr=0.0))


# -- Pre-clipping ------------------------------------------------------------------------------------------------------


def test_the_pre_clip_threshold_times_the_rate_is_constant_while_warming_up():
    options = {"pre_clip": 0.1, "warmup_steps": 10}
    for step in range(10):
        lr = 2e-3 * (step + 1) / 10
        assert pre_clip_threshold(group(lr=lr, steps_taken=step, **options)) * lr == pytest.approx(0.1 * 2e-3)
    assert pre_clip_threshold(group(lr=1e-5, steps_taken=10, **options)) == 0.1
    # At a rate of zero gradients still enter the moments.
    assert pre_clip_threshold(group(lr=0.0, **options)) == pytest.approx(0.1e6)


@pytest.mark.parametrize(
    ("decay", "halfway"), [("linear", 0.55), ("sqrt", 1 - 0.9 * 0.5**0.5), ("exponential", 0.1**0.5)]
)
def test_a_curve_of_the_pre_clip_threshold_spans_the_whole_of_training(decay, halfway):
    options = {"pre_clip": 2.0, "pre_clip_decay": decay, "warmup_steps": 10, "lr": 1e-4}
    found = [pre_clip_threshold(group(steps_taken=step, **options)) / 2.0 for step in (0, 50, 100)]
    assert found == pytest.approx([1.0, halfway, 0.1])
    on_device = [float(pre_clip_threshold(group(**options), torch.tensor(float(step)))) / 2.0 for step in (0, 50, 100)]
    assert on_device == pytest.approx(found, rel=1e-5)


def test_pre_clipping_ahead_of_a_global_bound_is_the_same_but_for_the_bound():
    def stepped(bound, ahead):
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
        for number, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.data = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer = spectrim.Momentum(model.parameters(), lr=0.1, pre_clip=0.5)
        if ahead:
            optimizer.pre_clip_()
        nn.utils.clip_grad_norm_(model.parameters(), bound)
        optimizer.step()
        norm = nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
        return [parameter.detach() for parameter in model.parameters()], norm, optimizer

    inside, ahead = stepped(1e9, False)[0], stepped(1e9, True)[0]
    for one, other in zip(inside, ahead, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    bounded, norm, optimizer = stepped(1.0, True)
    assert norm == pytest.approx(1.0, rel=1e-5)
    assert not torch.allclose(bounded[0], stepped(1.0, False)[0][0], atol=1e-3)
    # The next step pre-clips itself again.
    assert optimizer.rule_of(optimizer.param_groups[0], bounded[0]).pre_clip == 0.5
    assert optimizer._rule_of_step(optimizer.param_groups[0], "matrix", False, 0).pre_clip == 0.5


def test_gradients_are_pre_clipped_ahead_though_those_of_an_earlier_call_were_dropped():
    weight = nn.Parameter(torch.zeros(4, 6))
    optimizer = spectrim.Momentum([weight], lr=0.1, pre_clip=0.5)
    for _ in range(2):
        weight.grad = torch.ones(4, 6)
        optimizer.pre_clip_()
        assert torch.linalg.matrix_norm(weight.grad, 2) < 0.5


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


# -- The warm-up, from the rates of a scheduler ------------------------------------------------------------------------

WARM_UPS = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=20, pct_start=0.25),
    "LinearLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 16)], [4]
    ),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: min((step + 1) / 5, (20 - step) / 16)),
}


@pytest.mark.parametrize("schedule", WARM_UPS)
@pytest.mark.parametrize("maker", MAKERS)
def test_the_warm_up_is_read_from_the_rates_of_any_scheduler(maker, schedule):
    weight = nn.Parameter(torch.zeros(8, 8))
    optimizer = MAKERS[maker]([weight], lr=1e-2)
    scheduler = WARM_UPS[schedule](optimizer)
    seen = []
    for _ in range(20):
        found = optimizer.param_groups[0]
        seen.append((found["lr"], clip_threshold(found)))
        largest_move(optimizer, weight, steps=1)
        scheduler.step()
    peak = max(range(20), key=lambda step: seen[step][0])
    assert peak == 4
    assert [c * lr for lr, c in seen[:4] if lr] == pytest.approx([0.01] * 4)
    assert [c for lr, c in seen[4:] if lr > 1e-9] == pytest.approx([1.0] * len([lr for lr, _ in seen[4:] if lr > 1e-9]))


def test_a_loop_that_sets_rates_by_hand_states_its_peak_for_a_warm_up():
    weight = nn.Parameter(torch.zeros(8, 8))
    optimizer = spectrim.AdamW([weight], lr=1e-2, clip=1.0, peak_lr=1e-2)
    seen = []
    for lr in (2e-3, 5e-3, 1e-2, 5e-3):
        optimizer.param_groups[0]["lr"] = lr
        seen.append(clip_threshold(optimizer.param_groups[0]))
        largest_move(optimizer, weight, steps=1)
    assert seen == pytest.approx([5.0, 2.0, 1.0, 1.0])


@pytest.mark.parametrize("maker", MAKERS)
def test_without_a_stated_peak_there_is_no_warm_up(maker):
    weight = nn.Parameter(torch.zeros(8, 8))
    optimizer = MAKERS[maker]([weight], lr=1e-2)
    for lr in (2e-3, 5e-3, 1e-2):
        optimizer.param_groups[0]["lr"] = lr
        assert clip_threshold(optimizer.param_groups[0]) == 1.0
        largest_move(optimizer, weight, steps=1)


@pytest.mark.parametrize("maker", MAKERS)
def test_a_warm_up_ends_at_the_rate_that_timm_scales_down(maker):
    weight = nn.Parameter(torch.zeros(8, 8))
    optimizer = MAKERS[maker]([{"params": [weight], "lr_scale": 0.1}], lr=1e-2)
    timm_rates(optimizer)
    (group,) = optimizer.param_groups
    assert clip_threshold(group) == clip_threshold({**group, "warmup_steps": 0})
    assert clip_threshold({**group, "lr": 5e-4}) == pytest.approx(2 * clip_threshold(group))


def test_the_warm_up_goes_on_after_a_checkpoint_and_a_number_of_steps_takes_its_place():
    weight = nn.Parameter(torch.zeros(8, 8))
    first, again = (spectrim.AdamW([weight], lr=1e-2, clip=1.0, peak_lr=1e-2) for _ in range(2))
    step_at(first, weight, (1e-2,))
    again.load_state_dict(first.state_dict())
    assert clip_threshold({**again.param_groups[0], "lr": 5e-3}) == 1.0
    assert clip_threshold({**again.param_groups[0], "lr": 5e-3, "warmup_steps": 3}) == 2.0
    assert clip_threshold({**again.param_groups[0], "lr": 5e-3, "warmup_steps": 0}) == 1.0


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
