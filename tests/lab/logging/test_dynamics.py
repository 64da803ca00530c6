import random

import pytest

from spectrim.lab.logging.dynamics import find_spikes, read_dynamics


def noisy(count: int) -> list[float]:
    draw = random.Random(0)
    return [4.0 + draw.gauss(0, 0.05) for _ in range(count)]


def test_noise_is_no_spike_and_a_jump_is_one_however_long() -> None:
    losses: list[float | None] = [*noisy(200)]
    assert find_spikes(losses) == []
    losses[100:103] = [4.6, 5.0, 4.7]
    losses[150] = None  # not finite
    assert find_spikes(losses) == [3, 1]


def test_a_fall_is_no_spike_and_nothing_is_before_there_is_a_history() -> None:
    assert find_spikes([10 - 0.05 * step for step in range(100)]) == []
    assert find_spikes([4.0, 4.1, 9.0, 4.0]) == []


def record(loss: float | None, milliseconds: float, **more: float | None) -> dict[str, float | None]:
    return {"loss": loss, "forward_backward_ms": milliseconds, "optimizer_ms": 5.0, "rest_ms": 5.0, **more}


def test_time_is_that_of_steps_alone() -> None:
    records = [
        record(8.0, 90.0),
        record(7.0, 90.0, val_loss=6.0, evaluation_ms=1000.0),
        record(6.0, 90.0, checkpoint_ms=1000.0),
        record(5.0, 190.0, val_loss=5.0),
    ]
    dynamics = read_dynamics(records)
    assert dynamics is not None
    assert dynamics.seconds == pytest.approx((0.2, 0.5))
    assert dynamics.unevenness == pytest.approx(0.5 / 0.4)
    assert not dynamics.diverged


@pytest.mark.parametrize("final", [None, 8.5])
def test_a_run_diverged_if_it_ends_above_its_start_or_nowhere(final: float | None) -> None:
    dynamics = read_dynamics([record(8.0, 1.0), record(9.0, 1.0, val_loss=final)])
    assert dynamics is not None
    assert dynamics.diverged


def test_a_log_without_evaluation_says_nothing() -> None:
    assert read_dynamics([record(8.0, 1.0)]) is None
