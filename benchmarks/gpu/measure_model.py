"""What optimizers and the monitor cost of a whole training step of the 34 M model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.optim import Optimizer

import spectrim
from gpu.device import Device
from gpu.measure_operators import matmul_precision
from gpu.model import Language, Sizes, loss_of
from gpu.recipes import RECIPES
from gpu.results import Row, rows

__all__ = ["Trained", "monitoring", "shares"]


class Trained:
    """The model with a batch of random tokens, and its forward and backward pass, compiled where that is worth it."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.sizes = Sizes.of(device)
        self.model = Language(self.sizes).to(device.torch)
        self.forward: nn.Module = torch.compile(self.model) if device.cuda else self.model  # type: ignore[assignment]
        shape = (self.sizes.batch, self.sizes.length + 1)
        self.tokens = torch.randint(self.sizes.vocabulary, shape, device=device.torch)

    def backward(self) -> None:
        """Gradients of one batch, in the memory of those before."""
        self.model.zero_grad(set_to_none=False)
        loss_of(self.forward, self.tokens[:, :-1], self.tokens[:, 1:]).backward()  # type: ignore[no-untyped-call]

    def optimizer(self, recipe: str, *, in_tensor: bool) -> Optimizer:
        """A recipe's optimizer at its peak rate."""
        return RECIPES[recipe].build(self.model, 700, 70, self.device.torch, in_tensor=in_tensor)


def shares(device: Device) -> Iterator[Row]:
    """Forward and backward, and every recipe's step beside it: eager, and captured in a CUDA graph."""
    with matmul_precision("high"):
        trained = Trained(device)
        trained.backward()
        ms = device.ms(trained.backward)
        yield {"name": "forward and backward", "ms": ms, "tokens": trained.sizes.tokens}
        yield from rows(device, (({"name": name}, lambda name=name: share(trained, name, ms)) for name in RECIPES))


def share(trained: Trained, recipe: str, rest: float) -> Row:
    device = trained.device
    eager = device.ms(trained.optimizer(recipe, in_tensor=False).step)
    found: Row = {"eager_ms": eager, "eager_share": eager / (eager + rest)}
    replay = device.ms(device.captured(trained.optimizer(recipe, in_tensor=True).step))
    return {**found, "captured_ms": replay, "captured_share": replay / (replay + rest)}


def monitoring(device: Device) -> Iterator[Row]:
    """What a monitor adds: to a step that it does not measure, to one that it does, and to all at its default
    interval."""

    def cases() -> Iterator[tuple[Row, Callable[[], Row]]]:
        for recipe in ("adamw", "adamw+clip"):
            yield {"name": recipe}, lambda recipe=recipe: monitored(device, recipe)

    with matmul_precision("high"):
        yield from rows(device, cases())


def monitored(device: Device, recipe: str) -> Row:
    trained = Trained(device)
    optimizer = trained.optimizer(recipe, in_tensor=False)

    def step() -> None:
        trained.backward()
        optimizer.step()

    for _ in range(3):
        step()
    bare, kernels = timed(device, step), device.kernels(optimizer.step)
    watching = spectrim.SpectralMonitor(trained.model, optimizer, 10**9, out=None)
    watched = timed(device, step)
    launches = [device.kernels(optimizer.step) for _ in range(1 if device.small else 11)]
    waits = {device.waits(optimizer.step) for _ in range(11)} - {""}
    watching.close()
    measuring = spectrim.SpectralMonitor(trained.model, optimizer, 1, out=None)
    measured = timed(device, step, most=5)
    measuring.close()
    more = [count - kernels for count in launches if count is not None and kernels is not None]
    return {
        "step_ms": bare,
        "other_step_adds_ms": watched - bare,
        "other_step_launches": max(more, default=None),
        "other_step_waits": next(iter(waits), ""),
        "measured_step_adds_ms": measured - bare,
        "share_at_every_100": ((measured - bare) + 99 * (watched - bare)) / (100 * bare),
    }


def timed(device: Device, step: Callable[[], None], most: int = 30) -> float:
    """The mean time of a step of many: what a monitor reads now and then is shared among them."""
    count = 2 if device.small else most
    times = []
    for _ in range(3):
        device.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            step()
        device.synchronize()
        times.append(1e3 * (time.perf_counter() - start) / count)
    return statistics.median(times)
