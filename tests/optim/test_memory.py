"""How much memory a step takes on a device is a setting."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import spectrim
from spectrim.optim.memory import stack_bytes, workspace_bytes
from spectrim.optim.stepping.buckets import buckets
from spectrim.optim.stepping.entries import Entry


@pytest.fixture(autouse=True)
def restored():
    yield
    spectrim.set_step_memory()


def entries(count, rule):
    with FakeTensorMode():
        weights = [torch.empty(1024, 1024, device="cuda") for _ in range(count)]
    options = {"layout": "matrix", "split": None, "rule": rule, "position": (0, 0)}
    return [Entry(parameter=weight, grad=weight, **options) for weight in weights]


def rule():
    optimizer = spectrim.AdamW([torch.nn.Parameter(torch.ones(2, 2))], clip=1.0)
    return optimizer.rule_of(optimizer.param_groups[0], optimizer.param_groups[0]["params"][0])


@pytest.mark.parametrize(("megabytes", "expected"), [(8, [1] * 10), (32, [3, 3, 3, 1]), (512, [10])])
def test_matrices_go_in_buckets_that_fit(megabytes, expected):
    spectrim.set_step_memory(megabytes)
    assert stack_bytes() + workspace_bytes() == megabytes * 2**20
    found = buckets(entries(10, rule()))
    assert [sum(len(stack.entries) for stack in bucket) for bucket in found] == expected


@pytest.mark.parametrize("value", [0, -1, 1.5, "512"])
def test_no_memory_is_refused(value):
    with pytest.raises(ValueError, match=r"megabytes=.*: expected a positive integer"):
        spectrim.set_step_memory(value)
