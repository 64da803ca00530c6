"""A step of every optimizer on the matrices of two models: time, launches, waits, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.optim import Optimizer

from gpu.contenders import CONTENDERS, MODELS, Contender, Shapes
from gpu.device import Device
from gpu.measure_operators import matmul_precision
from gpu.results import Row, rows

__all__ = ["parameters", "shapes_of", "steps"]

SMALL: Shapes = [(96, 64), (64, 64), (128, 64), (64, 128)] * 2
AGAIN = ("torch.Muon", "adamw+clip", "adamw+clip exact", "spectra", "muon steps5", "muon exact")
"""What is timed with products of float32 in TF32 as well."""
SLOW = ("muon exact", "muon steps5 exact")
"""What takes seconds a step on the larger model, about as long as the clip does."""


def shapes_of(model: str, device: Device) -> Shapes:
    """The model's matrices, or a few small ones."""
    return SMALL if device.small else MODELS[model]


def parameters(shapes: Shapes, device: Device, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Weights and gradients of the sizes that training has, the same whenever they are made."""
    g = torch.Generator(device.torch).manual_seed(0)
    found = []
    for shape in shapes:
        param = nn.Parameter((0.02 * torch.randn(shape, generator=g, device=device.torch)).to(dtype))
        param.grad = (1e-3 * torch.randn(shape, generator=g, device=device.torch)).to(dtype)
        found.append(param)
    return found


def steps(device: Device) -> Iterator[Row]:
    """A row for every contender, model and precision of float32 products."""

    def cases() -> Iterator[tuple[Row, Callable[[], Row]]]:
        for setting in ("highest", "high"):
            for model in ("gpt2-small", "llama-1b"):
                for name, contender in CONTENDERS.items():
                    if model == "llama-1b" and name in SLOW:
                        continue
                    if setting == "highest" or name in AGAIN:
                        names = {"products": setting, "model": model, "name": name}
                        shapes = shapes_of(model, device)
                        yield names, lambda c=contender, s=shapes, p=setting: step(device, c, s, p)

    yield from rows(device, cases())


def step(device: Device, contender: Contender, shapes: Shapes, setting: str) -> Row:
    with matmul_precision(setting):
        optimizer = contender(parameters(shapes, device, contender.weights))
        ms = device.ms(optimizer.step)
        extra = device.extra_bytes(optimizer.step)
        waits = device.waits(optimizer.step)
        return {
            "ms": ms,
            "host_ms": device.host_ms(optimizer.step),
            "kernels": device.kernels(optimizer.step),
            "waits": waits,
            "extra_mb": None if extra is None else extra / 2**20,
            "state_mb": state_bytes(optimizer) / 2**20,
        }


def state_bytes(optimizer: Optimizer) -> int:
    tensors = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    return sum(x.numel() * x.element_size() for x in tensors)
