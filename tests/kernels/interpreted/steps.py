"""Whole steps of optimizers by kernels, against the same steps in eager form."""

import pytest
import torch
from torch import nn

import spectrim
from spectrim.kernels import use


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 24, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 10, 8))
        self.out = nn.Linear(8, 5)


def groups(model, split):
    experts = {"experts": {"role": "matrix", "layout": "stack"}}
    return spectrim.param_groups(model, split={"qkv.weight": split} if split else None, overrides=experts)


RECIPES = {
    "adamw": lambda g: spectrim.AdamW(g, lr=1e-2),
    "adamw+shrink": lambda g: spectrim.AdamW(g, lr=1e-2, shrink=2.0),
    "adamw+shrink of directions": lambda g: spectrim.AdamW(g, lr=1e-2, shrink=2.0, shrink_at="direction"),
    "muon+shrink": lambda g: spectrim.Muon(g, lr=1e-2, shrink=2.0),
    "momentum+clip": lambda g: spectrim.Momentum(g, lr=1e-2, clip=0.5),
    "ademamix+clip": lambda g: spectrim.AdEMAMix(g, lr=1e-2, clip=0.5),
    "mars+clip": lambda g: spectrim.MARS(g, lr=1e-2, clip=0.5),
    "spectra": lambda g: spectrim.Spectra(g, lr=1e-2),
}


SPLITS = [None, (8, 8, 8), ("interleaved", 2, 1, 1)]
# The kernels of Spectra have a file of their own, spike.py; here is what they leave to stacks.
CASES = [(recipe, split) for recipe in RECIPES for split in SPLITS if recipe != "spectra" or split == SPLITS[2]]


@pytest.mark.parametrize(("recipe", "split"), CASES)
def test_a_step_by_kernels_is_the_eager_one(recipe, split):
    trained = []
    for by_kernels in (False, True):
        torch.manual_seed(0)
        model = Net()
        optimizer = RECIPES[recipe](groups(model, split))
        with use(by_kernels):
            for _ in range(2):
                for parameter in model.parameters():
                    parameter.grad = torch.randn(parameter.shape)
                optimizer.step()
        trained.append(list(model.parameters()))
    for eager, kernel in zip(*trained, strict=True):
        torch.testing.assert_close(kernel, eager, rtol=1e-4, atol=1e-5)
