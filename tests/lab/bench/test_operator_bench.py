"""The benchmark of operators: it measures what it says, and refuses what it does not know."""

import json
from typing import get_args

import pytest
import torch

from spectrim.lab.bench.counting import Counter
from spectrim.lab.bench.matrices import matrix
from spectrim.lab.bench.settings import SolverName, SpectrumName
from spectrim.lab.cli.app import app
from spectrim.lab.errors import LabError
from spectrim.operators import Solver
from spectrim.operators._product import product


def run(*arguments: str) -> int:
    return app(["bench", "operators", *arguments], prog_name="spectrim", standalone_mode=False) or 0


def test_it_prints_a_table_and_writes_json_and_a_picture(tmp_path, capsys):
    rows, plot = tmp_path / "rows.json", tmp_path / "errors.svg"
    code = run("--shapes", "70x90,2x66x80", "--solver", "auto,newton_schulz", "--repeats", "1", "--threads", "1",
               "--json", str(rows), "--plot", str(plot))  # fmt: skip
    assert code == 0
    out = capsys.readouterr().out
    assert "1 threads" in out
    assert "2x66x80" in out
    result = json.loads(rows.read_text())
    assert [row["solver"] for row in result["clip"]] == ["auto", "newton_schulz"] * 2
    assert result["clip"][0]["error"] < 1e-3 < result["clip"][1]["error"]
    assert all(row["gigaflops"] > 0 and row["megabytes"] > 0 for row in result["clip"])
    assert result["spike"][0]["rank"] == 1
    assert plot.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--shapes", "7"), ("--shapes", "gpt5"), ("--solver", "svd"), ("--dtype", "int8"), ("--spectrum", "odd"),
     ("--ratio", "0"), ("--plot", "errors.txt")],
)  # fmt: skip
def test_unknown_values_are_named_with_what_is_allowed(option, value):
    with pytest.raises(LabError, match=rf"{value}.*(expected|should be greater than 0)"):
        run(option, value)


def test_the_solvers_that_can_be_measured_are_those_of_the_library():
    assert get_args(SolverName) == get_args(Solver)


def test_products_and_their_traffic_are_counted():
    X, Y = torch.ones(2, 3, 5), torch.ones(2, 5, 7)
    with Counter() as counter:
        X @ Y
    assert counter.flops == 2 * 2 * 3 * 5 * 7
    assert counter.bytes == 4 * 2 * (3 * 5 + 5 * 7 + 3 * 7)
    with Counter() as counter:
        product(torch.ones(80, 90), torch.ones(90, 70))
    assert counter.flops == 2 * 80 * 90 * 70


@pytest.mark.parametrize("spectrum", get_args(SpectrumName))
def test_every_spectrum_has_a_largest_singular_value_of_one(spectrum):
    X = matrix(spectrum, (2, 20, 30))
    assert X.shape == (2, 20, 30)
    torch.testing.assert_close(torch.linalg.matrix_norm(X, ord=2), torch.ones(2, dtype=torch.float64))


def test_the_benchmark_of_optimizers_prints_a_table_and_writes_json(tmp_path, capsys):
    rows = tmp_path / "rows.json"
    arguments = ["bench", "optimizers", "--block", "tiny", "--blocks", "1", "--repeats", "2", "--json", str(rows)]
    code = app([*arguments, "--contender", "spectra,muon"], prog_name="spectrim", standalone_mode=False)
    assert not code
    out = capsys.readouterr().out
    assert "torch.Muon" in out
    measured = {row["name"]: row for row in json.loads(rows.read_text())["optimizers"]}
    assert list(measured) == ["torch.AdamW fused", "torch.Muon", "spectra", "muon"]
    assert measured["torch.AdamW fused"]["to_fused_adamw"] == 1
    entries = 2 * 64 * 96
    assert measured["torch.AdamW fused"]["state_bytes"] == 2 * 4 * entries + 2 * 4  # two moments, and a count each
    assert measured["spectra"]["state_bytes"] <= 0.51 * measured["torch.AdamW fused"]["state_bytes"]
    assert measured["muon"]["orthogonality"] < 1e-3 < measured["torch.Muon"]["orthogonality"]


def test_an_unknown_contender_is_answered_with_those_there_are():
    with pytest.raises(LabError, match=r"'adam'.*'adamw\+clip'"):
        app(["bench", "optimizers", "--contender", "adam"], prog_name="spectrim", standalone_mode=False)
