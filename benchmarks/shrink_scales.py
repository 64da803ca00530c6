"""Entry-wise shrinkage before AdamW with other scales than one for each matrix, compared on the lab's text.

    python benchmarks/shrink_scales.py runs/shrink-scales        # about half an hour on two cores

The library shrinks entries beyond a factor of their matrix's entry scale. Here an entry's scale is that of its row, or
its own root mean square over time, Adam's √v: an entry is shrunk if it is large for its row, or unusual for itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectrim.lab.config import EvaluationConfig, ModelConfig, MonitorConfig
from spectrim.lab.experiments.comparison import compare
from spectrim.lab.experiments.settings import CompareConfig
from spectrim.lab.recipes.external import trust
from spectrim.operators import entry_scale

FACTOR = 6.0
WARMUP = 20
"""Steps without shrinkage, in which Adam's second moment settles."""


class Shrunk(torch.optim.AdamW):
    """AdamW on shrunk gradients."""

    def __init__(self, params: Iterable[Any], lr: float = 3e-3, betas: tuple[float, float] = (0.9, 0.95), **rest: Any):
        super().__init__(params, lr=lr, betas=betas, **rest)

    def scale(self, grad: Tensor, state: dict[str, Any], beta2: float) -> Tensor:
        """The scale of every entry, of a shape that the gradient's broadcasts with."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if parameter.grad is not None and state and state["step"] >= WARMUP:
                    scale = self.scale(parameter.grad, state, group["betas"][1])
                    shrunk = parameter.grad / (1 + (parameter.grad / (FACTOR * scale.clamp_min(1e-30))).square())
                    parameter.grad.copy_(shrunk)
        return super().step(closure)


class ByEntry(Shrunk):
    """An entry's scale is its own √v̂."""

    def scale(self, grad: Tensor, state: dict[str, Any], beta2: float) -> Tensor:
        return (state["exp_avg_sq"] / (1 - beta2 ** state["step"].item())).sqrt()


class ByRow(Shrunk):
    """An entry's scale is the entry scale of its row."""

    def scale(self, grad: Tensor, state: dict[str, Any], beta2: float) -> Tensor:
        return entry_scale(grad.reshape(-1, 1, grad.shape[-1])).view(*grad.shape[:-1], 1)


class ByMatrix(Shrunk):
    """An entry's scale is that of its matrix, as in the library."""

    def scale(self, grad: Tensor, state: dict[str, Any], beta2: float) -> Tensor:
        return entry_scale(grad if grad.ndim > 1 else grad[None])


def main(out: Path) -> None:
    variants = tuple(f"benchmarks.shrink_scales:{cls.__name__}" for cls in (ByMatrix, ByRow, ByEntry))
    trust(variants)
    config = CompareConfig(
        recipes=("adamw", *variants),
        seeds=(1, 2, 3),
        steps=160,
        model=ModelConfig(preset="1m"),
        evaluation=EvaluationConfig(times=8),
        monitor=MonitorConfig(every=0),
        lr=dict.fromkeys(variants, 0.003),
        embedding_lr=dict.fromkeys(variants, 16.0),
        head_lr=dict.fromkeys(variants, 16.0),
    )
    compare(config, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
