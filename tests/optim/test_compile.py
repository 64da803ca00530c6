"""The step under ``torch.compile``: the same update, in one graph, and no new one when the learning rate changes."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import spectrim

RECIPES = {
    "adamw": lambda params, lr: spectrim.AdamW(params, lr=lr),
    "adamw+shrink+clip": lambda params, lr: spectrim.AdamW(params, lr=lr, shrink=3.0, clip=0.5),
    "spectra": lambda params, lr: spectrim.Spectra(params, lr=lr),
    "muon": lambda params, lr: spectrim.Muon(params, lr=lr),
}


@pytest.mark.parametrize("make", RECIPES.values(), ids=RECIPES.keys())
def test_a_compiled_step_is_the_same_and_is_not_compiled_again_when_the_rate_changes(make):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    results = []
    for compiled in (False, True):
        generator = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((6, 4), (5, 8), (7,))]
        optimizer = make(parameters, torch.tensor(1e-2))
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        step = torch.compile(optimizer.step, backend=counter, fullgraph=True) if compiled else optimizer.step
        for number in range(6):
            for parameter in parameters:
                parameter.grad.copy_(torch.randn(parameter.shape, generator=generator))
            optimizer.param_groups[0]["lr"].fill_(1e-2 / (number + 1))
            step()
            if number == 1:
                graphs = counter.frame_count
        results.append([parameter.detach().clone() for parameter in parameters])
    assert 1 <= graphs <= 2  # Spectra's first step is another; steps are counted by a Python number
    assert counter.frame_count <= graphs + 1
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=2e-3, atol=2e-4)
