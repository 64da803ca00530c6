"""benchmarks/cuda.py: what fails is recorded and the rest goes on; rehearsed on the CPU, since no test has a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from gpu.device import Device  # noqa: E402
from gpu.results import Results, provenance, rows  # noqa: E402
from gpu.training import factor, seconds_to  # noqa: E402


def test_a_section_and_a_row_that_fail_say_why_and_the_rest_is_kept(tmp_path):
    device = Device("cpu", small=True)
    results = Results(tmp_path / "found.json", provenance(device), say=lambda _: None)

    def one_bad_row(device):
        yield from rows(device, [({"name": "a"}, lambda: {"ms": 1.0}), ({"name": "b"}, lambda: {"ms": 1 / 0})])

    def stops(device):
        yield {"name": "c"}
        raise RuntimeError("out of luck\nand more")

    done = [results.section(name, device, measure) for name, measure in (("rows", one_bad_row), ("stops", stops))]
    assert done == [False, False]
    found = json.loads((tmp_path / "found.json").read_text())["sections"]
    assert found["rows"]["rows"] == [
        {"name": "a", "ms": 1.0},
        {"name": "b", "failed": "ZeroDivisionError: division by zero"},
    ]
    assert found["stops"]["rows"] == [{"name": "c"}]
    assert found["stops"]["failed"] == "RuntimeError: out of luck"


def test_nothing_is_measured_once_the_time_is_over():
    device = Device("cpu", seconds=0.0)
    assert list(rows(device, [({"name": "a"}, lambda: {"ms": 1.0})])) == [
        {"name": "a", "failed": "not measured: out of time"}
    ]


def test_sections_of_the_same_code_on_the_same_device_stay_in_the_file(tmp_path):
    device = Device("cpu", small=True)
    about = provenance(device)
    for name, commit in (("first", "x"), ("second", "x"), ("third", "y")):
        results = Results(tmp_path / "found.json", {**about, "commit": commit}, say=lambda _: None)
        results.section(name, device, lambda _: [{"ms": 1.0}])
    assert list(results.content["sections"]) == ["third"]
    results = Results(tmp_path / "found.json", {**about, "commit": "y"}, say=lambda _: None)
    assert list(results.content["sections"]) == ["third"]


def test_seconds_to_a_loss_are_linear_between_evaluations():
    curve = [[1, 10, 2.0, 5.0], [2, 20, 4.0, 3.0], [3, 30, 6.0, 3.5]]
    assert seconds_to(curve, 4.0) == pytest.approx(3.0)
    assert seconds_to(curve, 5.5) == 2.0
    assert seconds_to(curve, 2.0) is None


def test_the_learning_rate_rises_to_its_peak_and_falls_to_a_tenth():
    found = [factor(number, 100, 10) for number in range(1, 101)]
    assert found[9] == max(found) == pytest.approx(1.0)
    assert found[-1] == pytest.approx(0.1)


def test_a_rehearsal_goes_through_its_sections(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "cuda.py"), "--device", "cpu", "--small"]
    out = tmp_path / "found.json"
    subprocess.run([*command, "--only", "equality,graph,share", "--out", str(out)], capture_output=True, text=True)
    sections = json.loads(out.read_text())["sections"]
    assert [section.get("failed") for section in sections.values()] == [None, None, None]
    differences = {row["name"]: row.get("difference", 0.0) for row in sections["graph"]["rows"]}
    assert max(differences.values()) < 1e-3
    assert sections["equality"]["rows"][0]["difference"] <= 1e-6
