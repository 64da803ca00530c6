"""``spectrim plan``: models by preset, model type and configuration; what it prints; what it refuses."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from spectrim.lab.errors import LabError
from spectrim.lab.plan import build_on_meta, plan, plan_command


def test_a_preset_is_planned_with_the_bytes_that_the_optimizer_would_hold() -> None:
    description = plan("tiny", "adamw", lr=0.25)
    assert {row.lr for row in description.rows if row.role == "matrix"} == {0.25}
    # AdamW's two moments and its step count, in float32.
    assert description.state_bytes == 8 * description.parameters + 4 * len(description.rows)
    roles = {row.name: row.role for row in description.rows}
    assert roles["model.embed_tokens.weight"] == "embedding"
    assert roles["lm_head.weight"] == "head"


def test_nothing_is_allocated() -> None:
    model = build_on_meta("llama")
    assert sum(parameter.numel() for parameter in model.parameters()) > 6e9
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_configuration_on_disk_names_its_architecture(tmp_path: Path, as_folder: bool) -> None:
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=48
    )
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(tmp_path)
    description = plan(str(tmp_path if as_folder else tmp_path / "config.json"), "spectra")
    rows = {row.name: row for row in description.rows}
    assert rows["classifier.weight"].role == "head"
    assert rows["bert.pooler.dense.weight"].rule == "momentum → shape spike"


def test_the_command_prints_a_table_with_whole_rows(capsys: pytest.CaptureFixture[str]) -> None:
    plan_command(model="tiny", recipe="adamw+clip")
    printed = capsys.readouterr().out
    assert all(row.name in printed for row in plan("tiny", "adamw+clip").rows)
    assert "12 tensors" in printed


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    plan_command(model="tiny", recipe="muon", lr=0.5, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert (printed["model"], printed["recipe"], printed["tensors"]) == ("tiny", "muon", 12)
    assert printed["rows"] == plan("tiny", "muon", lr=0.5).to_dict()["rows"]


@pytest.mark.parametrize(
    ("model", "recipe", "message"),
    [
        ("lama", "adamw", "unknown model 'lama', expected a preset .* close to it: llama"),
        ("tiny", "adam", "unknown recipe 'adam'"),
        ("xlnet", "adamw", "model 'xlnet', recipe 'adamw': cannot tell what these parameters are: .*rel_attn.q"),
    ],
)
def test_what_cannot_be_planned_is_told_in_one_error(model: str, recipe: str, message: str) -> None:
    with pytest.raises(LabError, match=message):
        plan(model, recipe)


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="is not a configuration of transformers"):
        plan(str(tmp_path), "adamw")


def test_planning_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    plan("tiny", "adamw")
    assert torch.equal(torch.get_rng_state(), before)
