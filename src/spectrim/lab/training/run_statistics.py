"""Statistics at the end of a run: optimizer state, weight norms and median times of a step."""

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["largest_singular_value", "state_bytes", "step_times", "weight_norm"]


WARMING_UP = 3
"""Steps at a run's start without times, since allocators and caches are still filling."""


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
    """The largest singular value of the hidden matrices, without embeddings and head."""
    import spectrim
    from spectrim.optim.grouping.layout import matrices

    largest = 0.0
    for group in spectrim.param_groups(model):
        if group["role"] == "matrix":
            for _, parameter in group["params"]:
                for weight in matrices(parameter.detach(), group["layout"], group["split"]):
                    largest = max(largest, float(torch.linalg.matrix_norm(weight.float(), 2).max()))
    return largest


def step_times(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians over a run's steps in milliseconds, and two shares of all its time.

    ``rest_ms`` is the time outside of model and optimizer, ``rest_share`` its share. ``overhead_share`` is the lab's
    own cost: the rest without the gradient's clip, which any loop has. A step includes no evaluation or checkpoint.
    """
    timed = records[WARMING_UP:] or records
    parts = {
        key: [record.get(key, 0.0) for record in timed]
        for key in ("forward_backward_ms", "optimizer_ms", "gradient_clip_ms", "logging_ms", "rest_ms")
    }
    overhead = list(map(sum, zip(parts["logging_ms"], parts["rest_ms"], strict=True)))
    rest = list(map(sum, zip(parts["gradient_clip_ms"], overhead, strict=True)))
    steps = list(map(sum, zip(*parts.values(), strict=True)))
    return {
        "step_ms": median(steps),
        "forward_backward_ms": median(parts["forward_backward_ms"]),
        "optimizer_ms": median(parts["optimizer_ms"]),
        "rest_ms": median(rest),
        "rest_share": sum(rest) / sum(steps),
        "overhead_share": sum(overhead) / sum(steps),
    }
