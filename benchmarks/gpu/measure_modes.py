"""The ways in which a step is run: as torch's own, captured, compiled, by Triton kernels, under a gradient scaler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import spectrim
from gpu.contenders import CONTENDERS, Contender, Shapes
from gpu.device import Device
from gpu.measure_optimizers import SMALL, parameters, shapes_of
from gpu.results import Row, rows

__all__ = ["capturing", "compiling", "equality", "kernels", "scaling"]

FEW: Shapes = [(768, 768), (768, 768), (768, 3072), (3072, 768)]
COMPILED = ("adamw", "adamw+shrink", "spectra", "adamw+clip", "muon steps5")
BY_KERNELS = ("adamw", "adamw bf16", "adamw+shrink", "spectra", "adamw+clip", "muon steps5", "ademamix+clip")
RATES = (1e-3, 7e-4, 2e-4)
"""Learning rates of steps that are compared, so that one that is not read would show."""


def few(device: Device) -> Shapes:
    return SMALL[:2] if device.small else FEW


def furthest(some: Sequence[Tensor], others: Sequence[Tensor], start: Sequence[Tensor]) -> float:
    """The largest difference between two models' weights, over the largest change from the start."""
    pairs = zip(some, others, start, strict=True)
    found = [((a - b).abs().max().item(), (a - first).abs().max().item()) for a, b, first in pairs]
    return max(difference for difference, _ in found) / max(change for _, change in found)


# -- As torch's own ---------------------------------------------------------------------------------------------------


def equality(device: Device) -> Iterator[Row]:
    """Plain AdamW against torch's over 50 steps, and what a gradient that is not finite leaves."""
    yield from rows(
        device,
        [
            ({"check": "adamw against torch's fused AdamW"}, lambda: against_torch(device)),
            ({"check": "a gradient with a NaN changes nothing"}, lambda: skipped(device, float("nan"))),
            ({"check": "a gradient with an infinity changes nothing"}, lambda: skipped(device, float("inf"))),
        ],
    )


def against_torch(device: Device) -> Row:
    params, twins = parameters(few(device), device), parameters(few(device), device)
    own, others = spectrim.AdamW(params, lr=1e-3), torch.optim.AdamW(twins, lr=1e-3, fused=True)
    for _ in range(50):
        for param, twin in zip(params, twins, strict=True):
            param.grad = torch.randn_like(param)
            twin.grad = param.grad.clone()
        own.step()
        others.step()
    return {"difference": max((a - b).abs().max().item() for a, b in zip(params, twins, strict=True))}


def skipped(device: Device, value: float) -> Row:
    """Steps with one bad gradient among good ones, whether or not there was a step before."""
    for before in (0, 1):
        params = parameters(few(device), device)
        optimizer = spectrim.AdamW(params, lr=1e-3, clip=5.0)
        for _ in range(before):
            optimizer.step()
        old = [param.detach().clone() for param in params]
        grad = params[1].grad
        assert grad is not None
        grad[0, 0] = value
        optimizer.step()
        if not all(torch.equal(a, b) for a, b in zip(old, params, strict=True)):
            return {"holds": False}
    return {"holds": True}


# -- Captured in a CUDA graph -----------------------------------------------------------------------------------------


def capturing(device: Device) -> Iterator[Row]:
    """Every recipe as a CUDA graph, its learning rate in a tensor: the same weights as eager, and the time of a
    replay."""

    def cases() -> Iterator[tuple[Row, Callable[[], Row]]]:
        for name, contender in CONTENDERS.items():
            if contender.captured:
                yield {"name": name}, lambda c=contender: captured(device, c)

    yield from rows(device, cases())


def captured(device: Device, contender: Contender) -> Row:
    shapes = shapes_of("gpt2-small", device)
    sides = []
    for _ in range(2):
        params = parameters(shapes, device, contender.weights)
        rate = torch.full((), RATES[0], device=device.torch)
        spectrim.set_step_memory(contender.memory)
        sides.append((params, rate, contender.make(params, rate)))
    start = [param.detach().clone() for param in sides[0][0]]
    eager = sides[0][2].step
    for _ in range(3):
        eager()
    replay = device.captured(sides[1][2].step, warm=3)
    for number, value in enumerate(RATES):
        for params, rate, _ in sides:
            rate.fill_(value)
            refill(params, number)
        eager()
        replay()
    difference = furthest(sides[0][0], sides[1][0], start)
    return {"difference": difference, "replay_ms": device.ms(replay), "eager_ms": device.ms(eager)}


def refill(params: Sequence[nn.Parameter], seed: int) -> None:
    """New gradients in the memory of the old."""
    g = torch.Generator(params[0].device).manual_seed(100 + seed)
    for param in params:
        assert param.grad is not None
        param.grad.copy_(1e-3 * torch.randn(param.shape, generator=g, device=param.device))


# -- Compiled ---------------------------------------------------------------------------------------------------------


def compiling(device: Device) -> Iterator[Row]:
    """Recipes compiled to one graph: the same weights as eager, graphs made anew when the rate changes, and times."""
    yield from rows(device, (({"name": name}, lambda name=name: compiled(device, name)) for name in COMPILED))


def compiled(device: Device, name: str) -> Row:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    sides = []
    for _ in range(2):
        params = parameters(few(device), device)
        rate = torch.full((), RATES[0], device=device.torch)
        sides.append((params, rate, CONTENDERS[name].make(params, rate)))
    start = [param.detach().clone() for param in sides[0][0]]
    backend = "aot_eager" if device.small else "inductor"
    eager, fast = sides[0][2].step, torch.compile(sides[1][2].step, fullgraph=True, backend=backend)
    for _ in range(2):
        eager()
        fast()
    graphs = counters["stats"]["unique_graphs"]
    for number, value in enumerate(RATES):
        for params, rate, _ in sides:
            rate.fill_(value)
            refill(params, number)
        eager()
        fast()
    found: Row = {"difference": furthest(sides[0][0], sides[1][0], start), "graphs": graphs}
    found["graphs_for_other_rates"] = counters["stats"]["unique_graphs"] - graphs
    return {**found, "compiled_ms": device.ms(fast), "eager_ms": device.ms(eager)}


# -- By Triton kernels ------------------------------------------------------------------------------------------------


def kernels(device: Device) -> Iterator[Row]:
    """Steps with Triton kernels on and off, on the matrices of both models: the same weights, and the time of
    either."""

    def cases() -> Iterator[tuple[Row, Callable[[], Row]]]:
        for model in ("gpt2-small", "llama-1b"):
            for name in BY_KERNELS:
                yield {"model": model, "name": name}, lambda name=name, model=model: by_kernels(device, name, model)

    yield from rows(device, cases())


def by_kernels(device: Device, name: str, model: str) -> Row:
    from spectrim.kernels import use

    contender = CONTENDERS[name]
    found: Row = {}
    weights: dict[bool, list[Tensor]] = {}
    for switch in (False, True):
        params = parameters(shapes_of(model, device), device, contender.weights)
        if not switch:
            start = [param.detach().clone() for param in params]
        with use(switch), device.clean():
            optimizer = contender(params)
            for number in range(3):
                refill(params, number)
                optimizer.step()
            weights[switch] = [param.detach().clone() for param in params]
            label = "kernels" if switch else "eager"
            found[f"{label}_ms"] = device.ms(optimizer.step, seconds=0.5)
            found[f"{label}_launches"] = device.kernels(optimizer.step)
            found[f"{label}_waits"] = device.waits(optimizer.step)
            del optimizer, params
    return {"difference": furthest(weights[False], weights[True], start), **found}


# -- Under a gradient scaler ------------------------------------------------------------------------------------------


def scaling(device: Device) -> Iterator[Row]:
    """Steps by a GradScaler: whether it waits, whether gradients are unscaled, and what an infinity leaves."""
    names = ("adamw", "spectra", "adamw+clip", "muon steps5")
    yield from rows(device, (({"name": name}, lambda name=name: scaled(device, name)) for name in names))


def scaled(device: Device, name: str) -> Row:
    params, twins = parameters(few(device), device), parameters(few(device), device)
    start = [param.detach().clone() for param in params]
    optimizer, plain = CONTENDERS[name](params), CONTENDERS[name](twins)
    scaler: Any = torch.amp.GradScaler(device.torch.type, init_scale=1024.0)
    scaler.scale(torch.ones((), device=device.torch))

    def step(factor: float) -> None:
        for param, twin in zip(params, twins, strict=True):
            assert twin.grad is not None
            param.grad = twin.grad * factor
        scaler.step(optimizer)
        scaler.update()

    for _ in range(2):
        step(1024.0)
        plain.step()
    found: Row = {"difference": furthest(params, twins, start)}
    found["waits"] = device.waits(lambda: step(1024.0))
    before = [param.detach().clone() for param in params]
    step(float("inf"))
    found["skips_infinities"] = all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    found["scale_after"] = scaler.get_scale()
    return found
