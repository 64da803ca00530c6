"""Optimizers by the names of the command line."""

import pytest
import torch
from torch import nn

import spectrim


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 5), nn.Linear(5, 7))


def step(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 0.1)
    optimizer.step()


def test_every_name_makes_an_optimizer_that_steps():
    names = spectrim.recipes()
    assert len(set(names)) == len(names) == 5 * 8 + 4 + 2
    assert names[0] == "adamw"
    assert {"adamw+clip", "adamw+shrink+preclip+clip", "spectra+shrink+clip", "muon+shrink"} < set(names)
    for name in names:
        step(spectrim.create(name, model(), lr=1e-2))


def test_a_name_is_the_class_with_its_options():
    torch.manual_seed(0)
    by_name, by_class = model(), model()
    one = spectrim.create("adamw+clip+shrink", by_name, lr=1e-2, clip=0.1, weight_decay=0.1, embedding_lr=3.0)
    groups = spectrim.param_groups(by_class, embedding_lr=3.0)
    other = spectrim.AdamW(groups, lr=1e-2, clip=0.1, shrink="auto", weight_decay=0.1)
    for optimizer in (one, other):
        step(optimizer)
    assert type(one) is spectrim.AdamW
    for a, b in zip(by_name.parameters(), by_class.parameters(), strict=True):
        assert torch.equal(a, b)


def test_preclip_is_the_published_threshold():
    optimizer = spectrim.create("adamw+preclip", model(), lr=1e-2)
    assert {group["pre_clip"] for group in optimizer.param_groups} == {0.1}


def test_parameters_are_taken_at_their_word():
    parameters = list(model().parameters())
    optimizer = spectrim.create("muon", parameters, lr=1e-2, momentum=0.9)
    assert optimizer.param_groups[0]["params"] == parameters


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adam", {}, "unknown recipe 'adam': expected base"),
        ("muon+clip", {}, r"unknown recipe 'muon\+clip': muon takes \+shrink"),
        ("adamw+clip+clip", {}, "a modifier stands twice"),
        ("adamw", {"clip": 5.0}, r"clip=5.0: recipe 'adamw' has no \+clip"),
        ("adamw+clip", {"clip": None}, r"clip=None: recipe 'adamw\+clip' has \+clip"),
    ],
)
def test_what_a_name_does_not_say_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        spectrim.create(name, model(), lr=1e-2, **options)


def test_what_is_for_modules_is_refused_with_parameters():
    with pytest.raises(ValueError, match="embedding_lr is for a module"):
        spectrim.create("adamw", model().parameters(), lr=1e-2, embedding_lr=2.0)
    with pytest.raises(TypeError):
        spectrim.create("adamw", model(), lr=1e-2, no_such_option=1)
