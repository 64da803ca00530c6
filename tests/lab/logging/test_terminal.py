"""What the terminal says while a run goes, and that it fits into eighty columns."""

import io
from typing import Any

import pytest
from rich.console import Console

from monitor_records import parameter_names, record
from spectrim.lab.config import TrainConfig
from spectrim.lab.logging import terminal
from spectrim.lab.logging.terminal import TerminalProgress, loudest, warning

NAMES = parameter_names(2)


def alarm(name: str, deviations: float | None) -> dict[str, Any]:
    message = f"step 7: update_rms of {name} is 0.01"
    return {"parameter": name, "quantity": "update_rms", "value": 0.01, "deviations": deviations, "message": message}


def logged(step: int) -> Any:
    times = {"forward_backward_ms": 80.0, "optimizer_ms": 10.0, "rest_ms": 5.0, "gradient_clip_ms": 5.0}
    return {"step": step, "tokens": 256 * step, "loss": 4.5, "lr": 1e-3, "grad_norm": 1.0, "val_loss": 4.25, **times}


def test_the_loudest_layer_is_what_a_step_moves_most_for_its_size() -> None:
    made = record(7, NAMES)
    made["parameters"]["model.layers.1.mlp.up_proj.weight"]["update_to_weight"] = 0.5
    made["parameters"]["model.layers.0.mlp.up_proj.weight"]["update_to_weight"] = None
    assert loudest(made) == "loudest: layer 1 · mlp.up_proj (a step is 50.00% of its norm)"
    assert loudest({"step": 1, "parameters": {}}) == ""


def test_a_layer_with_an_alarm_is_louder_and_warned_of_in_one_line() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    made = record(7, NAMES) | {"alarms": [alarm("lm_head.weight", 6.0), alarm(name, 9.0)]}
    assert loudest(made) == "loudest: layer 0 · mlp.up_proj (warned of at step 7)"
    assert warning(made) == "step 7: update_rms of layer 0 · mlp.up_proj is 0.01; 1 more"
    unfit = {"step": 7, "parameters": {}, "alarms": [alarm(name, 9.0), alarm("lm_head.weight", None)]}
    assert warning(unfit) == "step 7: update_rms of lm_head is 0.01; 1 more"
    assert warning(record(7, NAMES)) == ""


@pytest.mark.parametrize("is_terminal", [True, False])
def test_all_of_it_fits_into_eighty_columns(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    written = io.StringIO()
    console = Console(file=written, width=80, force_terminal=is_terminal, color_system=None)
    monkeypatch.setattr(terminal, "Console", lambda **_: console)
    config = TrainConfig(recipe="adamw+shrink+preclip+clip", steps=20_000)
    long = "model.layers.31.block_sparse_mixture_of_experts.gate_up_projection.weight"
    with TerminalProgress(runs=12, steps=20_000) as monitor:
        monitor.run_started(config)
        monitor.measured(record(7, [long]) | {"alarms": [alarm(long, 9.0)]})
        monitor.step(logged(19_999))
        lines = [line for each in monitor._bar.get_renderables() for line in console.render_lines(each)]
        shown = ["".join(segment.text for segment in line).rstrip() for line in lines]
    assert len(shown) == 3, "the bar, loss and speed, the loudest layer"
    assert all(len(line) <= 80 for line in shown)
    # 256 tokens a step of 100 ms.
    assert shown[1] == "loss 4.500 · validation 4.250 · 2,560 tokens/s"
    assert shown[2].startswith("loudest: layer 31 · block_sparse")
    line = next(line for line in written.getvalue().splitlines() if "update_rms" in line)
    assert len(line) <= 80 if is_terminal else line.endswith("is 0.01"), "a file has the whole line"
