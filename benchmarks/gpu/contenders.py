"""What is counted and timed: the shapes of two models, torch's optimizers, spectrim's recipes, and the goals they have.

An option that this version of spectrim does not have makes its rows say so, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes

import spectrim

__all__ = ["CONTENDERS", "GOALS", "MODELS", "MONITOR_LAUNCHES", "SHARES", "Contender", "Goal"]

Params = list[nn.Parameter]
Shapes = list[tuple[int, ...]]

LLAMA_BLOCK: Shapes = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192)]
MODELS: dict[str, Shapes] = {
    "gpt2-small": [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12,
    "llama-1b": LLAMA_BLOCK * 16,
}
"""The matrices of all blocks, outputs x inputs; embeddings, heads and vectors are not among them."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """An optimizer to compare.

    Attributes:
        make: parameters and learning rate to the optimizer.
        weights: dtype of the weights.
        captured: whether its step can be asked for in a CUDA graph, with a learning rate in a tensor.
        memory: what a step may take beside state, in megabytes.
    """

    make: Callable[[Params, float | Tensor], Optimizer]
    weights: torch.dtype = torch.float32
    captured: bool = True
    memory: int = 512

    def __call__(self, params: Params) -> Optimizer:
        """The optimizer at a learning rate of 1e-3. Sets the memory of all steps from here on."""
        spectrim.set_step_memory(self.memory)
        return self.make(params, 1e-3)


def torch_adamw(**kind: Any) -> Contender:
    return Contender(make=lambda params, lr: torch.optim.AdamW(params, lr=lr, **kind), captured=False)


def adamw(weights: torch.dtype = torch.float32, **options: Any) -> Contender:
    return Contender(make=lambda params, lr: spectrim.AdamW(params, lr=lr, **options), weights=weights)


def muon(**options: Any) -> Contender:
    return Contender(make=lambda params, lr: spectrim.Muon(params, lr=lr, **options))


def spectra(**options: Any) -> Contender:
    return Contender(make=lambda params, lr: spectrim.Spectra(params, lr=lr, **options))


def wrapped_adamw(params: Params, lr: float | Tensor) -> Optimizer:
    # The wrapper tries its base on small tensors, which must be real where the parameters are fake.
    with unset_fake_temporarily(), _disable_current_modes():
        base = torch.optim.AdamW(params, lr=lr, fused=True)
        return spectrim.SpectralClipping(base, clip="auto", peak_lr=1e-3)


# A tensor's value is not known when a threshold is chosen, so recipes that clip are told the peak learning rate.
AUTO: dict[str, Any] = {"clip": "auto", "peak_lr": 1e-3}

CONTENDERS: dict[str, Contender] = {
    "torch.AdamW fused": torch_adamw(fused=True),
    "torch.AdamW foreach": torch_adamw(foreach=True),
    "torch.Muon": Contender(make=lambda params, lr: torch.optim.Muon(params, lr=float(lr)), captured=False),
    "adamw": adamw(),
    "adamw+shrink": adamw(shrink="auto"),
    "spectra": spectra(),
    "adamw+clip": adamw(**AUTO),
    "muon steps5": muon(orthogonalize_steps=5),
    "adamw+clip bf16": adamw(torch.bfloat16, state_dtype="float32", **AUTO),
    "adamw bf16": adamw(torch.bfloat16, state_dtype="float32"),
    "adamw+clip 1 GB": Contender(make=lambda params, lr: spectrim.AdamW(params, lr=lr, **AUTO), memory=1024),
    "muon steps5 1 GB": Contender(
        make=lambda params, lr: spectrim.Muon(params, lr=lr, orthogonalize_steps=5), memory=1024
    ),
    "adamw+clip exact": adamw(precision="exact", **AUTO),
    "muon": muon(),
    "muon exact": muon(precision="exact"),
    "muon steps5 exact": muon(orthogonalize_steps=5, precision="exact"),
    "adamw+shrink+clip": adamw(shrink="auto", **AUTO),
    "signum+clip": Contender(make=lambda params, lr: spectrim.Signum(params, lr=lr, **AUTO)),
    "ademamix+clip": Contender(make=lambda params, lr: spectrim.AdEMAMix(params, lr=lr, **AUTO)),
    "momentum+clip": Contender(make=lambda params, lr: spectrim.Momentum(params, lr=lr, **AUTO)),
    "spectra+clip": spectra(**AUTO),
    # The wrapper reads its flag once a step.
    "wrapper clip": Contender(make=wrapped_adamw, captured=False),
}


@dataclass(frozen=True)
class Goal:
    """What a recipe should reach on an H100: its step over a peer's on either model, and its launches on GPT-2
    small."""

    peer: str
    gpt2_small: float
    llama_1b: float
    launches: int


GOALS: dict[str, tuple[Goal, ...]] = {
    "adamw": (Goal("torch.AdamW fused", 1.1, 1.1, 12),),
    "adamw+shrink": (Goal("torch.AdamW fused", 1.6, 1.6, 40),),
    "spectra": (Goal("torch.AdamW fused", 3.0, 2.5, 150), Goal("torch.Muon", 1 / 10, 1 / 3.9, 150)),
    "adamw+clip": (Goal("torch.Muon", 0.15, 1.0, 150),),
    "muon steps5": (Goal("torch.Muon", 0.15, 0.9, 140),),
    "adamw+clip bf16": (Goal("torch.Muon", 0.15, 1.0, 160),),
}
MONITOR_LAUNCHES = 20
"""What a monitor may launch on a step that it does not measure."""
SHARES = {"adamw+clip": 0.15, "spectra": 0.10}
"""The most that the optimizer may take of a step of the 34 M model, captured in a CUDA graph."""
