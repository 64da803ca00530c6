"""Trains the 34 M model by every recipe for the same number of steps, as many as the time allows: curves and a
table."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gpu.device import Device
from gpu.measure_operators import matmul_precision
from gpu.model import Language, Sizes, loss_of
from gpu.recipes import RECIPES, Recipe
from gpu.results import Row, rows

__all__ = ["Text", "read_tokens", "training"]

EVALUATIONS = 25
WARMUP = 0.1
"""Share of the steps over which the learning rate rises; from there it falls by a cosine to a tenth."""


class Text:
    """Tokens of one text: batches at random places of its first part, and the same few of its last.

    Args:
        tokens: (n,) whole numbers.
        held_out: tokens at the end that are never trained on.
    """

    def __init__(self, tokens: Tensor, sizes: Sizes, device: Device, held_out: int = 600_000) -> None:
        held_out = min(held_out, len(tokens) // 10)
        if held_out < 2 * sizes.length:
            raise ValueError(f"{len(tokens)} tokens of text: expected {20 * sizes.length} at least")
        self.sizes, self.device = sizes, device
        self.train, self.validation = tokens[:-held_out].to(device.torch), tokens[-held_out:].to(device.torch)

    def batch(self, generator: torch.Generator, *, validation: bool = False) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (batch, length) each."""
        source = self.validation if validation else self.train
        starts = torch.randint(len(source) - self.sizes.length - 1, (self.sizes.batch, 1), generator=generator)
        rows = source[(starts + torch.arange(self.sizes.length + 1)).to(source.device)].long()
        return rows[:, :-1], rows[:, 1:]


def read_tokens(path: Path | None, data: Sequence[str], sizes: Sizes, *, small: bool) -> Tensor:
    """Tokens from a file of 16-bit numbers; or of texts, tokenized by the lab; or, for a rehearsal, made up."""
    if path is not None:
        return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint16).to(torch.int32)
    if small:
        g = torch.Generator().manual_seed(0)
        steps = torch.randint(7, (40_000,), generator=g, dtype=torch.int32)
        return steps.cumsum(0).remainder(sizes.vocabulary).to(torch.int32)
    from spectrim.lab.config import DataConfig
    from spectrim.lab.data.tokens import prepare_tokens, resolve_data

    config = DataConfig(sources=tuple(data), vocabulary_size=sizes.vocabulary, sequence_length=sizes.length)
    tokens = prepare_tokens(resolve_data(config))
    arrays = [array for side in (tokens.train, tokens.validation) for stream in side for array in stream.arrays]
    return torch.cat([torch.from_numpy(array.astype("int32")) for array in arrays])


def training(text: Text, minutes: float, names: Sequence[str], *, capture: bool) -> Callable[[Device], Iterator[Row]]:
    """The section that trains by these recipes, "adamw" first, in so many minutes all together."""

    def measure(device: Device) -> Iterator[Row]:
        with matmul_precision("high"):
            model = Language(text.sizes).to(device.torch)
            forward: nn.Module = torch.compile(model) if device.cuda else model  # type: ignore[assignment]
            per_step = sum(trial(device, text, model, forward, RECIPES[name], capture) for name in names)
            steps = max(20, int(60 * minutes / (per_step * 1.15)))
            target: list[float] = []

            def run(name: str) -> Row:
                row = train(device, text, model, forward, RECIPES[name], steps, capture)
                if name == "adamw":
                    target.append(row["validation_loss"])
                row["seconds_to_adamw"] = seconds_to(row["curve"], target[0]) if target else None
                return row

            yield from rows(device, (({"name": name}, lambda name=name: run(name)) for name in names))

    return measure


def trial(device: Device, text: Text, model: nn.Module, forward: nn.Module, recipe: Recipe, capture: bool) -> float:
    """Seconds of a step, by a run of a few; zero for a recipe that fails, which its row will say."""
    try:
        row = train(device, text, model, forward, recipe, 3 if device.small else 20, capture, evaluations=1)
    except Exception:
        return 0.0
    return float(row["step_ms"]) / 1e3


def train(
    device: Device,
    text: Text,
    model: nn.Module,
    forward: nn.Module,
    recipe: Recipe,
    steps: int,
    capture: bool,
    evaluations: int = EVALUATIONS,
) -> Row:
    """One run from the seed: its curve of validation losses, and times of a step."""
    with torch.no_grad():
        for param, first in zip(model.parameters(), Language(text.sizes).parameters(), strict=True):
            param.copy_(first)
    model.zero_grad(set_to_none=True)
    warmup = max(1, round(WARMUP * steps))
    optimizer = recipe.build(model, steps, warmup, device.torch, in_tensor=capture)
    peaks = [float(group["lr"]) for group in optimizer.param_groups]
    take = Step(device, optimizer, capture)
    generator, curve, seconds = torch.Generator().manual_seed(1000), [], 0.0
    optimizer_ms: list[float] = []
    at = {round(steps * (index + 1) / evaluations) for index in range(evaluations)}
    device.synchronize()
    start = time.perf_counter()
    for number in range(1, steps + 1):
        set_rates(optimizer, peaks, factor(number, steps, warmup))
        loss_of(forward, *text.batch(generator)).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if number % 20 == 0 or steps < 40:
            optimizer_ms.append(timed(device, take))
        else:
            take()
        model.zero_grad(set_to_none=not capture)
        if number in at:
            device.synchronize()
            seconds += time.perf_counter() - start
            curve.append([number, number * text.sizes.tokens, round(seconds, 3), evaluate(text, forward)])
            device.synchronize()
            start = time.perf_counter()
    step_ms, ms = 1e3 * seconds / steps, statistics.median(optimizer_ms)
    return {
        "lr": recipe.lr,
        "factor": recipe.factor,
        "steps": steps,
        "captured": take.captured,
        "validation_loss": curve[-1][3],
        "seconds": seconds,
        "step_ms": step_ms,
        "optimizer_ms": ms,
        "optimizer_share": ms / step_ms,
        "curve": curve,
    }


class Step:
    """An optimizer's step: captured in a CUDA graph at its fourth call where that is asked for, eager before."""

    def __init__(self, device: Device, optimizer: Optimizer, capture: bool) -> None:
        self.device, self.optimizer = device, optimizer
        self.captured = capture and device.cuda
        self.calls = 0
        self.replay: Callable[[], object] = optimizer.step

    def __call__(self) -> None:
        """Take the step."""
        self.calls += 1
        if self.captured and self.calls == 4:
            self.replay = self.device.captured(self.optimizer.step, warm=0)
        self.replay()


def timed(device: Device, take: Callable[[], object]) -> float:
    device.synchronize()
    start = time.perf_counter()
    take()
    device.synchronize()
    return 1e3 * (time.perf_counter() - start)


def factor(number: int, steps: int, warmup: int) -> float:
    """Of the peak learning rate."""
    if number < warmup:
        return number / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (number - warmup) / max(1, steps - warmup)))


def set_rates(optimizer: Optimizer, peaks: Sequence[float], share: float) -> None:
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(peak * share)
        else:
            group["lr"] = peak * share


@torch.no_grad()
def evaluate(text: Text, forward: nn.Module) -> float:
    """The mean loss over the same twelve batches."""
    generator = torch.Generator().manual_seed(7)
    losses = [loss_of(forward, *text.batch(generator, validation=True)) for _ in range(12)]
    return float(torch.stack(losses).mean())


def seconds_to(curve: Sequence[Sequence[float]], loss: float) -> float | None:
    """When a curve first reaches a loss, linear between evaluations; None if never."""
    before: tuple[float, float] | None = None
    for _, _, seconds, value in curve:
        if value <= loss:
            if before is None or before[1] == value:
                return seconds
            return before[0] + (seconds - before[0]) * (before[1] - loss) / (before[1] - value)
        before = (seconds, value)
    return None
