"""Where records go: whole lines of a file, TensorBoard's event files, a run of Weights & Biases, a function."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import spectrim
from spectrim.monitor import Callback, JsonLines, TensorBoard, WeightsAndBiases

RECORD = {
    "step": 3,
    "skipped": 1,
    "parameters": {
        "model.layers.0.mlp.up_proj.weight": {"gradient_norm": 0.5, "update_rms": None, "skipped": 0},
        "lm_head.weight": {"gradient_norm": 2.0, "skipped": 1},
    },
    "alarms": [
        {
            "parameter": "lm_head.weight",
            "quantity": "update_rms",
            "value": 1.0,
            "trend": 0.1,
            "deviations": 9.0,
            "message": "step 3: look at lm_head.weight",
        }
    ],
    "ms": 1.5,
}
SCALARS = {
    "model.layers.0/mlp.up_proj.weight/gradient_norm": 0.5,
    "model.layers.0/mlp.up_proj.weight/skipped": 0,
    "outside of layers/lm_head.weight/gradient_norm": 2.0,
    "outside of layers/lm_head.weight/skipped": 1,
    "monitor/skipped": 1,
    "monitor/ms": 1.5,
}


def at(step):
    return {**RECORD, "step": step}


def test_lines_are_the_records(tmp_path):
    sink = JsonLines(tmp_path / "new" / "monitor.jsonl")
    sink(RECORD)
    assert json.loads(sink.path.read_text()) == RECORD
    sink(at(4))
    sink.close()
    assert [json.loads(line)["step"] for line in sink.path.read_text().splitlines()] == [3, 4]


def test_a_file_that_holds_something_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "monitor.jsonl"
    path.write_text("mine\n")
    with pytest.raises(FileExistsError, match=r"monitor.jsonl.*resume_step"):
        JsonLines(path)
    with pytest.raises(ValueError, match=r"not a file of records.*mine"):
        JsonLines(path, resume_step=3)
    assert path.read_text() == "mine\n"


def test_going_on_drops_what_came_later_and_a_line_that_was_cut_short(tmp_path):
    path = tmp_path / "monitor.jsonl"
    sink = JsonLines(path)
    for step in (1, 5, 9):
        sink(at(step))
    sink.close()
    with path.open("ab") as file:
        file.write(b'{"step": 12, "par')
    sink = JsonLines(path, resume_step=5)
    sink(at(6))
    sink.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 5, 6]


def test_going_on_before_a_first_record_begins_the_file(tmp_path):
    JsonLines(tmp_path / "monitor.jsonl", resume_step=0).close()
    assert (tmp_path / "monitor.jsonl").read_bytes() == b""


def test_a_line_that_does_not_fit_on_the_disk_is_not_there_at_all(tmp_path, monkeypatch):
    sink = JsonLines(tmp_path / "monitor.jsonl")
    sink(at(1))
    size = sink.path.stat().st_size

    class Full:
        def __init__(self, file):
            self.file, self.calls = file, 0

        def fileno(self):
            return self.file.fileno()

        def write(self, data):
            self.calls += 1
            if self.calls == 1:
                return self.file.write(bytes(data)[:10])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sink, "_file", Full(sink._file))
    with pytest.raises(OSError, match=r"monitor.jsonl"):
        sink(at(2))
    assert sink.path.stat().st_size == size


def test_tensorboard_has_every_number_by_layer_and_its_steps_are_void_after_a_resumption(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoard(tmp_path)
    sink(at(3))
    sink(at(8))
    sink.close()
    sink = TensorBoard(tmp_path, resume_step=3)
    sink(at(5))
    sink.close()
    events = EventAccumulator(os.fspath(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == set(SCALARS)
    for tag, value in SCALARS.items():
        found = events.Scalars(tag)
        assert [event.step for event in found] == [3, 5]
        assert found[0].value == pytest.approx(value)
    (text, *_) = events.Tensors("alarms/text_summary")
    assert b"look at lm_head.weight" in text.tensor_proto.string_val[0]


def test_weights_and_biases_has_every_number_offline(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    sink = WeightsAndBiases(project="test", mode="offline", dir=tmp_path)
    run = sink.run
    sink(RECORD)
    logged = dict(run.summary)
    sink.close()
    sink.close()
    assert {tag: logged[f"monitor/{tag}"] for tag in SCALARS} == SCALARS
    assert logged["monitor/step"] == 3
    assert list(tmp_path.rglob("*.wandb"))
    assert wandb.run is None
    with pytest.raises(ValueError, match=r"project"):
        WeightsAndBiases(run, project="other")


def test_a_library_that_is_missing_is_named(monkeypatch, tmp_path):
    for module, make in (("wandb", WeightsAndBiases), ("torch.utils.tensorboard", lambda: TensorBoard(tmp_path))):
        monkeypatch.setitem(__import__("sys").modules, module, None)
        with pytest.raises(ImportError, match=r"pip install"):
            make()


def test_a_function_is_a_sink_alone_and_among_others():
    model = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    alone, among = [], []
    with (
        spectrim.SpectralMonitor(model, optimizer, 1, out=alone.append),
        spectrim.SpectralMonitor(model, optimizer, 1, out=[Callback(lambda _: None), among.append]),
    ):
        model(torch.randn(2, 3)).sum().backward()
        optimizer.step()
    assert [record["step"] for record in (*alone, *among)] == [1, 1]
    with pytest.raises(TypeError, match="out=5: expected a path, a function"):
        spectrim.SpectralMonitor(model, optimizer, 1, out=5)


def test_the_documented_loop_reads_a_file_in_which_a_record_only_warns(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "monitor.md").read_text(encoding="utf-8")
    (loop,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "json.loads(line)" in block]
    monkeypatch.chdir(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    measured = {"step": 2, "skipped": 0, "parameters": {name: {"gradient_spike_share": 0.25}}, "ms": 1.0}
    sink = JsonLines("monitor.jsonl")
    for record in ({**RECORD, "step": 1, "parameters": {}}, measured, {**measured, "step": 3, "parameters": {}}):
        sink(record)
    sink.close()
    exec(loop, {})
    assert capsys.readouterr().out.splitlines() == ["step 3: look at lm_head.weight", "2 0.25"]


def test_several_sinks_get_the_same_record_and_are_closed(tmp_path):
    model = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    records = []
    out = [tmp_path / "a.jsonl", Callback(records.append), JsonLines(tmp_path / "b.jsonl")]
    monitor = spectrim.SpectralMonitor(model, optimizer, 1, out=out)
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    monitor.close()
    assert (
        json.loads((tmp_path / "a.jsonl").read_text()) == json.loads((tmp_path / "b.jsonl").read_text()) == records[0]
    )
    with pytest.raises(ValueError, match=r"closed"):
        out[2](records[0])
