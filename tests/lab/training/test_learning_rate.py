import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrim.lab.config import ScheduleConfig, TrainConfig
from spectrim.lab.errors import LabError
from spectrim.lab.training.learning_rate import learning_rate_factor

SHAPES = ("cosine", "wsd", "constant")


def factors(steps: int, **schedule: object) -> list[float]:
    config = TrainConfig(recipe="adamw", steps=steps, schedule=ScheduleConfig(**schedule))  # type: ignore[arg-type]
    return [learning_rate_factor(step, config) for step in range(steps)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_warms_up_linearly_to_the_peak(shape: str) -> None:
    assert factors(100, shape=shape, warmup_fraction=0.1)[:11] == pytest.approx(
        [k / 10 for k in range(1, 11)] + [1], 3e-4
    )


def test_cosine_is_half_a_period_of_the_cosine() -> None:
    curve = factors(100, warmup_fraction=0.2, final_fraction=0.1)
    assert curve[-1] == pytest.approx(0.1)
    assert curve[59] == pytest.approx(0.55)  # half way from step 20 to step 100
    assert curve[39] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)


def test_the_only_step_of_a_run_is_its_last() -> None:
    assert factors(1, final_fraction=0.1) == pytest.approx([0.1])


@pytest.mark.parametrize(("decay", "half_way"), [("linear", 0.5), ("1-sqrt", 1 - math.sqrt(0.5))])
def test_wsd_is_stable_and_then_decays_over_the_last_steps(decay: str, half_way: float) -> None:
    curve = factors(100, shape="wsd", decay=decay, decay_fraction=0.4, final_fraction=0.2)
    assert curve[9:60] == [1.0] * 51
    assert curve[60] < 1.0
    assert curve[79] == pytest.approx(0.2 + 0.8 * half_way)
    assert curve[99] == pytest.approx(0.2)


def test_constant_stays_at_the_peak() -> None:
    assert factors(50, shape="constant", final_fraction=0.0)[5:] == [1.0] * 45


@given(
    st.integers(1, 40),
    st.sampled_from(SHAPES),
    st.floats(0, 0.5),
    st.floats(0.01, 0.5),
    st.floats(0, 1),
    st.sampled_from(["linear", "1-sqrt"]),
)
def test_no_step_is_above_the_peak_and_after_the_warm_up_none_rises(
    steps: int, shape: str, warmup: float, decay: float, final: float, how: str
) -> None:
    schedule = {"shape": shape, "warmup_fraction": warmup, "decay_fraction": decay, "final_fraction": final}
    curve = factors(steps, **schedule, decay=how)
    peak = max(curve)
    after = curve[curve.index(peak) :]
    assert peak <= 1
    assert after == sorted(after, reverse=True)
    assert min(curve) >= 0


def test_phases_that_do_not_fit_are_refused_by_name() -> None:
    values = {"recipe": "adamw", "schedule": {"shape": "wsd", "warmup_fraction": 0.5, "decay_fraction": 0.7}}
    with pytest.raises(LabError, match=r"schedule: warmup_fraction=0.5 and decay_fraction=0.7 exceed 1 together"):
        TrainConfig.parse(values, source="options")
