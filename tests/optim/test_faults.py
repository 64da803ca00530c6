"""Gradients of every kind of badness, for a long time: nothing non-finite gets in, nothing of it leaves a trace."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import spectrim

RECIPES = {
    "adamw": lambda params: spectrim.AdamW(params, lr=1e-2),
    "adamw+shrink+clip": lambda params: spectrim.AdamW(params, lr=1e-2, shrink="auto", clip="auto"),
    "adamw+preclip, hard clip": lambda params: spectrim.AdamW(
        params, lr=1e-2, pre_clip=0.1, clip=1.0, clip_form="hard"
    ),
    "signum+clip": lambda params: spectrim.Signum(params, lr=1e-2, clip="auto"),
    "ademamix+clip": lambda params: spectrim.AdEMAMix(params, lr=1e-2, clip="auto", slow_warmup_steps=50),
    "mars+clip": lambda params: spectrim.MARS(params, lr=1e-2, clip="auto"),
    "momentum": lambda params: spectrim.Momentum(params, lr=1e-3),
    "spectra": lambda params: spectrim.Spectra(params, lr=1e-2),
    "spectra+shrink+clip": lambda params: spectrim.Spectra(params, lr=1e-2, shrink=3.0, clip="auto"),
    "muon": lambda params: spectrim.Muon(params, lr=1e-2),
    "muon+shrink, rough": lambda params: spectrim.Muon(params, lr=1e-2, shrink=3.0, orthogonalize_steps=5),
    "wrapped": lambda params: spectrim.SpectralClipping(torch.optim.AdamW(params, lr=1e-2), clip="auto"),
}
SHAPES = ((6, 4), (3, 5, 4), (7,), (1, 1), (0, 3))
BAD = ("huge", "one inf", "one nan", "all nan")
KINDS = (
    "ordinary",
    "zero",
    "denormal",
    "tiny",
    "large",
    "huge",
    "one inf",
    "one nan",
    "all nan",
    "missing",
    "low rank",
)
STEPS = math.ceil(3_000 / len(RECIPES))


def gradient(shape, kind, generator):
    """A gradient of a kind, and whether an optimizer has to take it."""
    grad = torch.randn(shape, generator=generator)
    if kind == "missing":
        return None, False
    if kind in ("one inf", "one nan") and grad.numel():
        grad.view(-1)[int(torch.randint(grad.numel(), (), generator=generator))] = float(kind.removeprefix("one "))
        return grad, False
    if kind == "low rank" and grad.ndim >= 2 and grad.numel():
        return grad[..., :1] @ grad[..., :1, :], True
    scales = {"zero": 0.0, "denormal": 1e-42, "tiny": 1e-25, "large": 1e6, "huge": 1e30, "all nan": float("nan")}
    taken = grad.numel() == 0 or kind not in ("huge", "all nan")
    return grad * scales.get(kind, 1.0), taken


def states(optimizer, parameter):
    state = optimizer.state[parameter]
    return [value for key, value in sorted(state.items()) if isinstance(value, torch.Tensor) and key != "skipped"]


@pytest.mark.parametrize("make", RECIPES.values(), ids=RECIPES.keys())
def test_thousands_of_steps_of_bad_gradients_leave_every_number_finite(make):
    generator = torch.Generator().manual_seed(1)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = make(parameters)
    taken = [0] * len(parameters)
    for number in range(STEPS):
        # Every third step may be bad: one bad gradient is enough to skip it.
        kinds = KINDS if number % 3 == 0 else [kind for kind in KINDS if kind not in BAD]
        chosen = [kinds[int(torch.randint(len(kinds), (), generator=generator))] for _ in parameters]
        found = [gradient(p.shape, kind, generator) for p, kind in zip(parameters, chosen, strict=True)]
        good = all(takes or grad is None for grad, takes in found)
        for index, (parameter, (grad, takes)) in enumerate(zip(parameters, found, strict=True)):
            parameter.grad = grad
            taken[index] += good and takes
        optimizer.step()
        for parameter in parameters:
            assert parameter.isfinite().all()
            assert all(value.isfinite().all() for value in states(optimizer, parameter))
    for parameter, count in zip(parameters, taken, strict=True):
        assert optimizer.state[parameter]["step"] == count
    assert max(taken) > STEPS / 2


def test_narrow_state_of_wide_weights_takes_no_gradient_that_it_could_not_hold():
    weight = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
    optimizer = spectrim.AdamW([weight], state_dtype="bfloat16")
    before = weight.detach().clone()
    weight.grad = torch.full_like(weight, 1e30)
    optimizer.step()
    assert torch.equal(weight, before)
    assert optimizer.skipped_steps() == {"group 0, parameter 0": 1}
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert all(value.isfinite().all() for value in states(optimizer, weight))


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "wrapped"])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_bad_gradients_leave_no_trace(name, data):
    """Any shape, dtype and scale: what follows is bit for bit what it would be had the bad steps never come."""
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    scale = 10 ** data.draw(st.floats(-12, 6))
    kinds = ["ordinary", *data.draw(st.lists(st.sampled_from(KINDS), max_size=6)), "ordinary"]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    start = torch.randn(shape, generator=generator)
    one, other = nn.Parameter(start.to(dtype)), nn.Parameter(start.to(dtype))
    optimizer, undisturbed = RECIPES[name]([one]), RECIPES[name]([other])
    for kind in kinds:
        grad, taken = gradient(torch.Size(shape), kind, generator)
        one.grad = None if grad is None else (grad * (scale if kind == "ordinary" else 1)).to(dtype)
        optimizer.step()
        # Float64 holds what float32 must skip.
        if taken or (kind == "huge" and dtype == torch.float64):
            other.grad = one.grad
            undisturbed.step()
    assert torch.equal(one, other)
    assert one.isfinite().all()
    for mine, its in itertools.zip_longest(states(optimizer, one), states(undisturbed, other)):
        assert torch.equal(mine, its)
