"""The fuzz holds on a few cases, and finds what is broken on purpose."""

import itertools
import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import fuzz


@pytest.fixture(autouse=True)
def alone():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


CASES = 12


def report(folder, *arguments):
    """Some cases, on every machine as many: each takes a minute by this clock."""
    out, clock = folder / "fuzz.json", mock.Mock(monotonic=itertools.count(0, 60).__next__)
    command = ["fuzz.py", "--minutes", str(CASES + 1), "--out", str(out), *arguments]
    with mock.patch.object(sys, "argv", command), mock.patch.object(fuzz, "time", clock):
        status = fuzz.main()
    return status, json.loads(out.read_text())


def test_a_few_cases_hold_and_are_written_down(tmp_path):
    status, found = report(tmp_path, "--seed", "7")
    assert status == 0
    assert found["failures"] == []
    assert found["cases"] == CASES
    assert found["steps"] >= CASES


def test_what_moves_too_far_is_found_and_can_be_run_again(tmp_path, capsys):
    with mock.patch("spectrim.optim.stepping.operate.clip_scale", return_value=3.0):
        status, found = report(tmp_path, "--seed", "7")
        assert status == 1
        failure = next(each for each in found["failures"] if each["what"].startswith("bound"))
        assert f"python benchmarks/fuzz.py --case {failure['case']}" in capsys.readouterr().out
        dist.destroy_process_group()
        with mock.patch.object(sys, "argv", ["fuzz.py", "--case", str(failure["case"])]):
            assert fuzz.main() == 1
    assert failure["what"] in capsys.readouterr().out


# A convolution's weight as a vector, sharded and empty, had no scale.
@pytest.mark.parametrize("case", [5000000300])
def test_what_failed_once_holds(case):
    with mock.patch.object(sys, "argv", ["fuzz.py", "--case", str(case)]):
        assert fuzz.main() == 0
