"""``spectrim plan``: models by preset, model type and configuration; what it prints; what it refuses."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers

from spectrim.cli import main
from spectrim.lab.errors import LabError
from spectrim.lab.planning.plan import SCALING_RECIPES, build_on_meta, optimizer_on_meta, plan, plan_scaling
from spectrim.lab.planning.scaling import cost, read_work
from spectrim.lab.planning.settings import Cluster, Hardware


def test_a_preset_is_planned_with_the_bytes_that_the_optimizer_would_hold() -> None:
    description = plan("tiny", "adamw", lr=0.25)
    assert {row.lr for row in description.rows if row.role == "matrix"} == {0.25}
    # AdamW's two moments and its step count, in float32.
    assert description.state_bytes == 8 * description.parameters + 8 * len(description.rows)
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
    assert main(["plan", "--model", "tiny", "--recipe", "adamw+clip"]) == 0
    printed = capsys.readouterr().out
    assert all(row.name in printed for row in plan("tiny", "adamw+clip").rows)
    assert "12 tensors" in printed


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "tiny", "--recipe", "muon", "--lr", "0.5", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["model"], printed["recipe"], printed["tensors"]) == ("tiny", "muon", 12)
    assert printed["rows"] == plan("tiny", "muon", lr=0.5).to_dict()["rows"]


@pytest.mark.parametrize(
    ("model", "recipe", "message"),
    [
        ("lama", "adamw", "unknown model 'lama', expected a preset .* close to it: llama"),
        (
            "llama3-9b",
            "adamw",
            "unknown model 'llama3-9b', .*published shape .*llama3-70b, moe-1t.* close to it: llama3-8b",
        ),
        ("tiny", "adam", "unknown recipe 'adam'"),
        ("xlnet", "adamw", "model 'xlnet', recipe 'adamw': unknown role of the parameters .*rel_attn.q"),
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


def test_a_projection_has_a_row_for_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--world", "64", "--parallel", "hsdp", "--shard", "16", "--flops", "2e14", "--bandwidth", "1e10"]
    assert main(["plan", "--model", "llama3-8b", *flags, "--tokens", "4096", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["recipe"] for row in printed["recipes"]] == list(SCALING_RECIPES)
    assert (printed["world"], printed["parallel"], printed["shard"]) == (64, "hsdp", 16)
    assert (printed["flops"], printed["bandwidth"], printed["tokens"]) == (2e14, 1e10, 4096)
    assert printed["active_parameters"] == 8_030_261_248
    work = read_work(optimizer_on_meta(build_on_meta("llama3-8b"), "llama3-8b", "spectra"))
    cluster = Cluster(world=64, parallel="hsdp", shard=16)
    (spectra,) = (row for row in printed["recipes"] if row["recipe"] == "spectra")
    assert spectra["cost"] == asdict(cost(work, cluster))


def test_a_projection_prints_a_table_that_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "tiny", "--world", "4"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{recipe} " in printed for recipe in SCALING_RECIPES)
    words = " ".join(printed.split())
    assert "tiny, 4 ranks, fsdp." in words
    assert "Arithmetic, not a measurement." in words
    assert main(["plan", "--model", "tiny", "--world", "4", "--recipe", "muon"]) == 0
    printed = capsys.readouterr().out
    assert "\nmuon " in printed
    assert " adamw " not in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parallel", "fsdp"], "--parallel fsdp: only for a projection; add --world"),
        (["--tokens", "8"], "--tokens 8: only for a projection"),
        (["--world", "8", "--lr", "0.1"], "--lr 0.1: the cost of a step does not depend on it"),
        (["--world", "8", "--parallel", "tp"], "parallel='tp': input should be 'ddp', 'fsdp' or 'hsdp'"),
        (["--world", "12", "--parallel", "hsdp"], "--shard 8: hsdp on 12 ranks expects a divisor of 12"),
        (["--world", "8", "--flops", "0"], "flops=0.0: input should be greater than 0"),
        (["--world", "8", "--recipe", "torch.optim:SGD"], "what SGD costs on many ranks is not known"),
    ],
)
def test_flags_of_a_projection_that_make_no_sense_are_refused_in_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", "tiny", *flags]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_projecting_a_mixture_counts_the_parameters_that_a_token_meets() -> None:
    hardware = Hardware(flops=1e14, bandwidth=1e10, tokens=1)
    active, (muon,) = plan_scaling("moe-1t", ["muon"], Cluster(world=64), hardware)
    assert active == pytest.approx(32.9e9, rel=0.01)
    seconds = muon.cost.seconds(hardware)
    assert muon.share == pytest.approx(seconds / (seconds + 6 * active / 1e14))
