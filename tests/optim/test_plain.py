"""What numpy and other libraries hand over becomes plain values, for checkpoints that load with weights_only=True."""

from collections import OrderedDict, UserDict, UserList

import pytest
import torch
from torch import nn

import spectrim
from spectrim.optim.grouping.plain import as_option, unwrapped

np = pytest.importorskip("numpy")


def test_containers_and_numbers_become_pythons_own() -> None:
    tensor = torch.ones(2)
    given = UserDict({"a": UserList([np.float32(0.5), np.int64(3)]), "b": (np.bool_(True), tensor), "c": np.arange(2)})
    found = unwrapped(given)
    assert found["b"][1] is tensor
    assert repr(found) == "{'a': [0.5, 3], 'b': (True, tensor([1., 1.])), 'c': [0, 1]}"
    ordered = OrderedDict(a=1)
    assert unwrapped(ordered) is ordered
    assert as_option(UserList([np.float64(0.9), 1])) == (0.9, 1)


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_numbers_of_numpy_mean_what_pythons_mean_and_are_not_saved(kind: str) -> None:
    number = getattr(np, kind)
    model = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 4))
    groups = spectrim.param_groups(model, embedding_lr=0.5)
    optimizer = spectrim.AdamW(groups, lr=number(0.25), betas=np.array([0.5, 0.75]), clip=number(4))
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.25, 0.25]
    for group in optimizer.param_groups:
        group["lr"] = number(0.5)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for group in optimizer.state_dict()["param_groups"]:
        assert type(group["lr"]) is float
        assert group["betas"] == (0.5, 0.75)
        assert all(type(value).__module__ != "numpy" for value in group.values())
