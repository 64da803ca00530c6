"""Norms of gradients, and functions applied to their logical matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spectrim.operators import ShrinkForm, entry_scale, smooth_shrink
from spectrim.optim.grouping.layout import Layout, Split, matrices, put_back
from spectrim.optim.spectral.base import StepContext
from spectrim.optim.spectral.clip import CLIPS

__all__ = ["clipped_vector", "map_matrices", "shrink_entries", "squared_norm"]


def squared_norm(grad: Tensor) -> Tensor:
    """The sum of squares as a float64 scalar; not finite if any entry is not."""
    norm: Tensor = torch.linalg.vector_norm(grad, dtype=torch.float64)
    return norm.square()


def clipped_vector(grad: Tensor, norm: Tensor, threshold: float | Tensor, form: str) -> Tensor:
    """A new tensor with the clipped norm, for a gradient of this norm, a scalar in float64."""
    operator = CLIPS[form].of({"precision": "exact"})
    factor = operator.vector_factors(norm.reshape(1), StepContext(threshold=threshold))
    assert factor is not None
    return grad * factor.to(grad.dtype)


def shrink_entries(tensor: Tensor, factor: float, form: ShrinkForm, layout: Layout, split: Split | None) -> Tensor:
    """A new tensor, with entries shrunk that are large against the entry scale of their logical matrix."""
    return map_matrices(lambda G: smooth_shrink(G, factor * entry_scale(G), form=form), tensor, layout, split)


def map_matrices(function: Callable[[Tensor], Tensor], tensor: Tensor, layout: Layout, split: Split | None) -> Tensor:
    """Apply a function to every logical matrix of a tensor, or to the whole tensor if it is a vector."""
    if layout == "vector":
        return function(tensor.reshape(-1)).view_as(tensor)
    if split is None and layout in ("matrix", "stack"):
        return function(tensor)
    # Convolutions in channels_last can be viewed as matrices only once they are contiguous.
    source, result = tensor.contiguous(), torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    targets = matrices(result, layout, split)
    for matrix, target in zip(matrices(source, layout, split), targets, strict=True):
        target.copy_(function(matrix))
    put_back(targets, result, layout, split)
    return result
