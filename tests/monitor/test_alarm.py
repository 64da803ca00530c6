"""The rule that warns: of a jump at its step and of its matrix, and of nothing else."""

import logging
import math

import pytest
import torch
from torch import nn

import spectrim
from spectrim.monitor import Alarm, Callback


def feed(alarm, values, *, name="w", lr=1.0):
    """The steps at which a rule warns of a series."""
    found = []
    for step, value in enumerate(values, start=1):
        found += [step for _ in alarm(step, {name: {"update_rms": value, "lr": lr}})]
    return found


def noise(steps: int, spread: float, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return (1e-3 * torch.exp(spread * torch.randn(steps, generator=generator))).tolist()


def test_a_jump_is_warned_of_once_at_its_step_with_its_numbers():
    values = noise(100, 0.1)
    values[60:63] = [5e-3] * 3
    values[80] = 5e-3
    alarm = Alarm()
    assert feed(alarm, values) == [61, 81]
    alarm = Alarm()
    feed(alarm, values[:60])
    (alert,) = alarm(61, {"w": {"update_rms": 5e-3, "lr": 1.0}, "other": {"update_rms": 5e-3, "lr": 1.0}})
    assert alert["parameter"] == "w"
    assert alert["trend"] == pytest.approx(1e-3, rel=0.1)
    assert alert["value"] == 5e-3
    assert alert["deviations"] == pytest.approx(math.log(5) / 0.1, rel=0.4)
    assert alert["message"].startswith("step 61: update_rms of w is 0.005, ")


@pytest.mark.parametrize("spread", [0.01, 0.1, 0.3])
def test_noise_is_hardly_ever_warned_of(spread):
    """Fewer than one warning in 10,000 values, for log-normal ones."""
    warnings = sum(len(feed(Alarm(), noise(2000, spread, seed))) for seed in range(10))
    assert warnings <= 2


def test_a_drift_a_schedule_and_a_small_rise_are_not_warned_of():
    drift = [1e-3 * 1.02**step for step in range(200)]
    assert feed(Alarm(), drift) == []
    alarm = Alarm()
    for step in range(1, 300):
        lr = 1e-3 * min(1.0, step / 50) if step < 200 else 5e-3
        assert alarm(step, {"w": {"update_rms": 0.2 * lr, "lr": lr}}) == []
    assert feed(Alarm(), [1e-3] * 50 + [1.2e-3]) == []


def test_an_outlier_bends_the_trend_by_no_more_than_three_deviations():
    """So that after it a smaller jump is still one; an outlier that counted in full would hide it for 50 steps."""
    values = noise(80, 0.1)
    values[60] = 10.0
    values[66] = 2.5e-3
    alarm = Alarm()
    assert feed(alarm, values[:60]) == []
    before = alarm.state_dict()["w"]
    assert feed(alarm, values[60:]) == [1, 7]
    alarm = Alarm()
    feed(alarm, values[:61])
    after = alarm.state_dict()["w"]
    assert after["mean"] - before["mean"] == pytest.approx(3 * before["deviation"] / 50)
    grown = before["deviation"] * (1 + (3 * math.sqrt(math.pi / 2) - 1) / 50)
    assert after["deviation"] == pytest.approx(grown)


def test_steps_that_moved_nothing_stay_out_of_the_trend():
    values = noise(100, 0.1)
    with_skips = [v for value in values for v in (value, 0.0)]
    plain, skipping = Alarm(), Alarm()
    feed(plain, values)
    feed(skipping, with_skips)
    assert plain.state_dict() == skipping.state_dict()
    assert skipping(999, {"w": {"update_rms": 0.1, "lr": 0.0}}) == []


def test_what_is_not_finite_is_warned_of_once_and_stays_out_of_the_trend():
    alarm = Alarm()
    feed(alarm, noise(50, 0.1))
    trend = alarm.state_dict()["w"]["mean"]
    assert feed(alarm, [math.nan, math.inf, math.nan]) == [1]
    assert alarm.state_dict()["w"]["mean"] == trend


def test_a_new_level_becomes_the_trend():
    values = [*noise(60, 0.1), *(10 * value for value in noise(300, 0.1, 1))]
    values[330] = 0.5
    assert feed(Alarm(), values) == [61, 331]


@pytest.mark.parametrize("option", [{"deviations": 0.0}, {"history": 1}, {"memory": 2.5}, {"floor": math.nan}])
def test_a_wrong_option_is_refused_by_name(option):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Alarm(**option)


def model_and_optimizer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 40))
    return model, torch.optim.SGD(model.parameters(), lr=1e-2)


def run(model, optimizer, steps, jump=None):
    for step in range(1, steps + 1):
        model(torch.randn(64, 40)).square().mean().backward()
        if step == jump:
            model[2].weight.grad *= 100
        optimizer.step()
        optimizer.zero_grad()


def test_a_run_whose_update_jumps_is_warned_of_between_measurements(caplog):
    model, optimizer = model_and_optimizer()
    records = []
    monitor = spectrim.SpectralMonitor(model, optimizer, 100, out=Callback(records.append))
    with caplog.at_level(logging.WARNING, logger="spectrim.monitor"):
        run(model, optimizer, 45, jump=33)
        monitor.close()
    (record,) = [record for record in records if record["step"] == 33]
    assert record["parameters"] == {}
    assert [alert["parameter"] for alert in record["alarms"]] == ["2.weight"]
    assert "step 33: update_rms of 2.weight is" in caplog.text


def test_a_warning_of_a_measured_step_is_in_its_record():
    model, optimizer = model_and_optimizer()
    with spectrim.SpectralMonitor(model, optimizer, 33, out=None) as monitor:
        run(model, optimizer, 33, jump=33)
    assert [alert["parameter"] for alert in monitor.last["alarms"]] == ["2.weight"]
    assert monitor.last["parameters"].keys() == {"0.weight", "2.weight"}


def test_any_callable_is_a_rule_and_sees_all_metrics_of_a_measured_step():
    model, optimizer = model_and_optimizer()
    seen = {}

    def rule(step, values):
        seen[step] = set(values["0.weight"])
        return [{"parameter": "0.weight", "message": "look at this"}] if step == 2 else None

    with spectrim.SpectralMonitor(model, optimizer, 3, out=None, alarm=rule) as monitor:
        run(model, optimizer, 2)
    assert monitor.last["alarms"][0]["message"] == "look at this"
    assert seen == {1: {"update_rms", "lr"}, 2: {"update_rms", "lr"}}
    with spectrim.SpectralMonitor(model, optimizer, 1, out=None, alarm=rule):
        run(model, optimizer, 1)
    assert {"gradient_spectral_norm", "weight_norm", "update_rms", "lr"} <= seen[1]


def test_another_quantity_is_watched_on_measured_steps():
    model, optimizer = model_and_optimizer()
    alarm = Alarm(quantity="gradient_norm", history=5)
    with spectrim.SpectralMonitor(model, optimizer, 1, out=None, alarm=alarm) as monitor:
        run(model, optimizer, 12)
        assert "alarms" not in monitor.last
        (1e3 * model(torch.randn(64, 40)).square().mean()).backward()
        optimizer.step()
    assert {alert["quantity"] for alert in monitor.last["alarms"]} == {"gradient_norm"}
