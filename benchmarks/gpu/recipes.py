"""How the 34 M model is trained by each recipe: options, and the rates that did best in the run of 2026-11-27."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import spectrim

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """An optimizer with its peak learning rate, and the factor on it for embeddings and head."""

    make: Callable[..., Optimizer]
    lr: float
    factor: float
    options: dict[str, Any]

    def build(self, model: nn.Module, steps: int, warmup: int, device: torch.device, *, in_tensor: bool) -> Optimizer:
        """The optimizer of a model, for so many steps; ``in_tensor``: with rates in tensors, as a CUDA graph needs."""
        lr: float | Tensor = torch.full((), self.lr, device=device) if in_tensor else self.lr
        options = {"betas": (0.9, 0.95), "weight_decay": 0.1, **self.options}
        if "clip" in options:
            options |= {"warmup_steps": warmup, "total_steps": steps}
        groups = spectrim.param_groups(model, embedding_lr=self.factor, head_lr=self.factor)
        return self.make(groups, lr=lr, **options)


RECIPES: dict[str, Recipe] = {
    "adamw": Recipe(spectrim.AdamW, 2e-3, 4.0, {}),
    "adamw+clip": Recipe(spectrim.AdamW, 8e-3, 2.0, {"clip": "auto"}),
    "spectra": Recipe(spectrim.Spectra, 2e-3, 4.0, {}),
    "muon steps5": Recipe(spectrim.Muon, 4e-3, 4.0, {"orthogonalize_steps": 5}),
    "adamw+shrink": Recipe(spectrim.AdamW, 2e-3, 4.0, {"shrink": "auto"}),
}
