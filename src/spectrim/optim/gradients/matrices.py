"""Norms of gradients, and clipping and shrinking of their logical matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spectrim.operators import entry_scale, hard_clip, smooth_shrink, soft_clip
from spectrim.optim.gradients.norms import largest_singular_value, squared_norm
from spectrim.optim.grouping.layout import Layout, Split, matrices, put_back
from spectrim.optim.rules.rule import Shrink
from spectrim.optim.spectral.base import StepContext
from spectrim.optim.spectral.clip import CLIPS

__all__ = ["Clipping", "shrink_entries", "squared_norm"]


@dataclass(frozen=True)
class Clipping:
    """The options of clipping: the form, "soft" or "hard", the threshold, and True if vectors are clipped too."""

    form: str
    threshold: float
    vectors: bool

    def clipped(self, grad: Tensor, layout: Layout, split: Split | None) -> tuple[Tensor, Tensor | None]:
        """The largest singular value of a gradient, or a vector's norm; and a new, clipped tensor, or None."""
        if layout == "vector":
            norm = squared_norm(grad).sqrt()
            return norm, self.clipped_vector(grad, norm)
        norm, clip = largest_singular_value(grad, layout, split), soft_clip if self.form == "soft" else hard_clip
        return norm, _map_matrices(lambda G: clip(G, self.threshold), grad, layout, split)

    def clipped_vector(self, grad: Tensor, norm: Tensor) -> Tensor | None:
        """A new tensor with the clipped norm, for a gradient of this norm, a scalar in float64; or None."""
        if not self.vectors:
            return None
        operator = CLIPS[self.form].of({"precision": "exact"})
        factor = operator.vector_factors(norm.reshape(1), StepContext(threshold=self.threshold))
        assert factor is not None
        return grad * factor.to(grad.dtype)


def shrink_entries(tensor: Tensor, shrink: Shrink, layout: Layout, split: Split | None) -> Tensor:
    """A new tensor, with entries shrunk that are large against the entry scale of their logical matrix."""
    factor, form = shrink.factor, shrink.form
    return _map_matrices(lambda G: smooth_shrink(G, factor * entry_scale(G), form=form), tensor, layout, split)


def _map_matrices(function: Callable[[Tensor], Tensor], tensor: Tensor, layout: Layout, split: Split | None) -> Tensor:
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
