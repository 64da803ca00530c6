"""What a finished run is measured by, beside its losses: state, weights, and medians of its times."""

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["largest_singular_value", "state_bytes", "step_times", "weight_norm"]

WARMING_UP = 3
"""Steps at a run's start whose times are left out: allocators and caches fill."""


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every tensor in the optimizer's state."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(list(optimizer.state.values())))


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


@torch.no_grad()
def weight_norm(model: nn.Module) -> float:
    """Frobenius norm of all weights taken together."""
    return float(torch.stack([parameter.float().norm() for parameter in model.parameters()]).norm())


@torch.no_grad()
def largest_singular_value(model: nn.Module) -> float:
    """The largest singular value of any hidden matrix: embeddings and head are not among them."""
    import spectrim
    from spectrim.optim.layout import matrices

    largest = 0.0
    for group in spectrim.param_groups(model):
        if group["role"] == "matrix":
            for _, parameter in group["params"]:
                for weight in matrices(parameter.detach(), group["layout"], group["split"]):
                    largest = max(largest, float(torch.linalg.matrix_norm(weight.float(), 2).max()))
    return largest


def step_times(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians over a run's steps in milliseconds, and the share of all its time outside model and optimizer.

    Evaluations and checkpoints are not part of a step.
    """
    timed = records[WARMING_UP:] or records
    columns = {key: [record[key] for record in timed] for key in ("forward_backward_ms", "optimizer_ms", "rest_ms")}
    steps = [sum(parts) for parts in zip(*columns.values(), strict=True)]
    return {
        "step_ms": median(steps),
        **{key: median(values) for key, values in columns.items()},
        "rest_share": sum(columns["rest_ms"]) / sum(steps),
    }
