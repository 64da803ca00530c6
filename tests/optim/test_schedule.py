"""Thresholds over time against the sentences of the paper."""

import pytest

from spectrim.optim.schedule import clip_threshold


def group(**values):
    defaults = {
        "lr_scale": 1.0,
        "clip": 5.0,
        "lr": 2e-3,
        "peak_lr": 2e-3,
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
    assert clip_threshold(group(clip="auto", lr=8e-3, peak_lr=8e-3, lr_scale=4.0)) == pytest.approx(5.0)


def test_an_automatic_threshold_without_a_peak_is_an_error_that_says_what_to_give():
    with pytest.raises(ValueError, match=r"peak_lr=0.0 with clip='auto' at lr=0.001"):
        clip_threshold(group(clip="auto", lr=1e-3, peak_lr=0.0))
