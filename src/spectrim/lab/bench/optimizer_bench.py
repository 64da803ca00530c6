"""The benchmark of optimizers: every recipe against torch's own, on the shapes of real blocks.

Each contender has its own copy of the parameters and sees the same gradients; the contenders take turns step by step,
so that a busy machine slows all of them. Times are medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import spectrim
from spectrim.lab.bench.settings import BLOCKS
from spectrim.lab.errors import LabError
from spectrim.lab.training.run_statistics import state_bytes, tensors

__all__ = ["CONTENDERS", "OptimizerRow", "bench_optimizers"]

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

CONTENDERS: dict[str, Make] = {
    "torch.AdamW fused": lambda params: torch.optim.AdamW(params, fused=True),
    "torch.AdamW foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    "torch.Muon": lambda params: torch.optim.Muon(params, adjust_lr_fn="match_rms_adamw"),
    "adamw": lambda params: spectrim.AdamW(params),
    "adamw+clip": lambda params: spectrim.AdamW(params, clip="auto"),
    "adamw+shrink": lambda params: spectrim.AdamW(params, shrink="auto"),
    "adamw+shrink+clip": lambda params: spectrim.AdamW(params, shrink="auto", clip="auto"),
    "signum+clip": lambda params: spectrim.Signum(params, clip="auto"),
    "ademamix+clip": lambda params: spectrim.AdEMAMix(params, clip="auto"),
    "momentum+clip": lambda params: spectrim.Momentum(params, clip="auto"),
    "spectra": lambda params: spectrim.Spectra(params),
    "spectra bfloat16": lambda params: spectrim.Spectra(params, state_dtype="bfloat16"),
    "spectra+clip": lambda params: spectrim.Spectra(params, clip="auto"),
    "muon": lambda params: spectrim.Muon(params),
    "muon rough": lambda params: spectrim.Muon(params, orthogonalize_steps=5),
    "muon+shrink": lambda params: spectrim.Muon(params, shrink="auto"),
}
FUSED_ADAMW, TORCH_MUON = "torch.AdamW fused", "torch.Muon"


@dataclass(frozen=True, kw_only=True)
class OptimizerRow:
    """Measurements of one contender.

    Attributes:
        step_ms: median time of a step.
        to_fused_adamw, to_muon: medians, over the rounds, of the ratio to torch's fused AdamW and to torch's Muon.
        state_bytes: all state tensors.
        extra_bytes: the peak memory of tensors made during one step; workspaces inside kernels do not count.
        orthogonality: ‖UUᵀ/s − I‖_F/√m of one step's update U, over its matrices' mean square singular value s: 0
            for an
            orthogonal update.
    """

    name: str
    step_ms: float
    to_fused_adamw: float
    to_muon: float
    state_bytes: int
    extra_bytes: int
    orthogonality: float


def bench_optimizers(
    *,
    block: str = "gpt2-small",
    blocks: int = 2,
    contenders: Sequence[str] = (),
    repeats: int = 15,
    compiled: bool = False,
    device: str = "cpu",
    progress: Callable[[str], object] = lambda _: None,
) -> list[OptimizerRow]:
    """Measure contenders on as many blocks of a shape set.

    Args:
        contenders: names to measure beside torch's fused AdamW and Muon, which every ratio needs; empty for all.
        repeats: rounds that count, after two that do not.
        compiled: let ``torch.compile`` compile the steps of spectrim's contenders.

    Raises:
        LabError: an unknown shape set or contender.
    """
    if block not in BLOCKS:
        raise LabError(f"unknown shapes {block!r}, expected one of {', '.join(BLOCKS)}")
    makes = available()
    for name in contenders:
        if name not in makes:
            raise LabError(f"unknown contender {name!r}, expected one of {', '.join(map(repr, makes))}")
    names = [name for name in makes if not contenders or name in contenders or name in (FUSED_ADAMW, TORCH_MUON)]
    shapes = BLOCKS[block] * blocks
    running = {
        name: Contender(makes[name], shapes, device, compiled and not name.startswith(("torch", "pytorch")))
        for name in names
    }
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(repeats + 2):
        progress(f"round {round_number + 1} of {repeats + 2}")
        for name, contender in running.items():
            elapsed = contender.step()
            if round_number >= 2:
                times[name].append(elapsed)
    return [
        OptimizerRow(
            name=name,
            step_ms=1e3 * statistics.median(times[name]),
            to_fused_adamw=ratio(times[name], times[FUSED_ADAMW]),
            to_muon=ratio(times[name], times[TORCH_MUON]),
            state_bytes=state_bytes(contender.optimizer),
            extra_bytes=contender.extra_bytes(),
            orthogonality=contender.orthogonality(),
        )
        for name, contender in running.items()
    ]


def available() -> dict[str, Make]:
    """The contenders that are installed; some come from the package pytorch-optimizer."""
    found = dict(CONTENDERS)
    if find_spec("pytorch_optimizer") is not None:
        import pytorch_optimizer

        found["pytorch_optimizer.Muon"] = lambda params: pytorch_optimizer.Muon([{"params": params, "use_muon": True}])
        found["pytorch_optimizer.SOAP"] = lambda params: pytorch_optimizer.SOAP(params)
        found["pytorch_optimizer.AdEMAMix"] = lambda params: pytorch_optimizer.AdEMAMix(params)
    return found


class Contender:
    """One optimizer with parameters of its own and gradients that look like training's: noise with a spike."""

    def __init__(self, make: Make, shapes: Sequence[tuple[int, ...]], device: str, compiled: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameters = []
        for shape in shapes:
            parameter = nn.Parameter((0.02 * torch.randn(shape, generator=generator)).to(device))
            outer = torch.randn(shape[0], 1, generator=generator) * torch.randn(1, shape[1], generator=generator)
            parameter.grad = (1e-3 * (torch.randn(shape, generator=generator) + 5 * outer)).to(device)
            self.parameters.append(parameter)
        self.optimizer = make(self.parameters)
        self.device = torch.device(device)
        self.take_step: Callable[[], Any] = torch.compile(self.optimizer.step) if compiled else self.optimizer.step

    def step(self) -> float:
        """Seconds of one step."""
        self.wait()
        start = time.perf_counter()
        self.take_step()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def extra_bytes(self) -> int:
        """The peak memory of tensors made during one step."""
        kept = {tensor.untyped_storage().data_ptr() for tensor in tensors(list(self.optimizer.state.values()))}
        live = LiveBytes(kept)
        with live:
            self.optimizer.step()
        return live.peak

    def orthogonality(self) -> float:
        """The mean distance of one step's updates from orthogonal matrices, without weight decay."""
        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.0
        before = [parameter.detach().double() for parameter in self.parameters]
        self.optimizer.step()
        for group, decay in zip(self.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        deviations = []
        for old, parameter in zip(before, self.parameters, strict=True):
            update = old - parameter.detach().double()
            if update.shape[0] > update.shape[1]:
                update = update.mT
            gram = update @ update.mT
            size = gram.diagonal().mean()
            identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            deviations.append(float((gram / size - identity).norm() / len(gram) ** 0.5))
        return statistics.fmean(deviations)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that appear inside the context, while they live."""

    def __init__(self, kept: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self.known = set(kept)
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        for tensor in tensors([*args, *(kwargs or {}).values()]):
            address = tensor.untyped_storage().data_ptr()
            if address not in self.live:
                self.known.add(address)
        result = func(*args, **(kwargs or {}))
        self.live = {address: entry for address, entry in self.live.items() if not entry[0].expired()}  # type: ignore[no-untyped-call]
        for tensor in tensors([result]):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.known:
                self.live[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())  # type: ignore[no-untyped-call]
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(mine / its for mine, its in zip(times, others, strict=True))
