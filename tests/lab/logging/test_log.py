from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from monitor_records import record as record_of_monitor
from spectrim.lab.config import OptimizerConfig, TrainConfig
from spectrim.lab.errors import LabError
from spectrim.lab.logging.log import RunLog, read_log


def record(step: int) -> Any:
    return {
        "step": step,
        "tokens": 10 * step,
        "loss": 1 / step,
        "val_loss": 2.0,
        "val_loss_by_frequency": {"1-3": 0.5, "4-9": None},
    }


def test_a_log_cut_back_to_its_checkpoint_has_neither_duplicates_nor_holes(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    with RunLog(file, resume_step=0) as log:
        for step in range(1, 8):
            log.write(record(step))
    with file.open("ab") as end:
        end.write(b'{"step": 8, "lo')
    with RunLog(file, resume_step=5) as log:
        for step in range(6, 11):
            log.write(record(step))
    assert read_log(file) == [record(step) for step in range(1, 11)]


def test_tensorboard_sees_every_step_once_after_a_resume(tmp_path: Path) -> None:
    for start, end in ((0, 7), (5, 10)):
        with RunLog(tmp_path / "log.jsonl", resume_step=start) as log:
            for step in range(start + 1, end + 1):
                log.write(record(step))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/train")] == [
        (step, pytest.approx(1 / step)) for step in range(1, 11)
    ]
    assert [event.value for event in events.Scalars("loss_by_frequency/1-3")] == [0.5] * 10
    assert "loss_by_frequency/4-9" not in events.Tags()["scalars"]


def test_tensorboard_has_settings_and_measurements(tmp_path: Path) -> None:
    config = TrainConfig(recipe="adamw+clip", optimizer=OptimizerConfig(lr=0.01))
    measured = record_of_monitor(3, ["model.layers.10.mlp.up_proj.weight", "lm_head.weight"])
    measured["alarms"] = [{"message": "step 3: it rises"}]
    with RunLog(tmp_path / "log.jsonl", resume_step=0, config=config) as log:
        log.write_measurement(measured)
        log.write(record(3))
    events = EventAccumulator(str(tmp_path)).Reload()
    (found,) = events.Scalars("spectra · layer 10 · mlp.up_proj/gradient norm")
    expected = measured["parameters"]["model.layers.10.mlp.up_proj.weight"]["gradient_norm"]
    assert (found.step, found.value) == (3, pytest.approx(expected))
    assert {"spectra · lm_head/update to weight", "spectra/largest update to weight"} <= set(events.Tags()["scalars"])
    assert set(events.PluginTagToContent("text")) == {"configuration", "alarms"}
    assert b'recipe = "adamw+clip"' in events.Tensors("configuration")[0].tensor_proto.string_val[0]
    content = events.PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info
    assert start.hparams["recipe"].string_value == "adamw+clip"
    assert start.hparams["lr"].number_value == 0.01
    assert "momentum" not in start.hparams, "what is not set is left out"
    experiment = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    columns = {info.name: info for info in experiment.hparam_infos}
    assert {"momentum", "rank_ratio"} <= columns.keys(), "what other runs have set has its column"
    assert columns["recipe"].differs
    assert not columns["beta1"].differs
    assert [metric.name.tag for metric in experiment.metric_infos] == ["loss/validation", "loss/train"]


def test_a_log_that_ends_before_its_checkpoint_is_refused(tmp_path: Path) -> None:
    with RunLog(tmp_path / "log.jsonl", resume_step=0) as log:
        log.write(record(1))
    with pytest.raises(LabError, match="does not hold steps 1 to 2"):
        RunLog(tmp_path / "log.jsonl", resume_step=2)
