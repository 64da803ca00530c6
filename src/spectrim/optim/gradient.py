"""What happens to a gradient before the base direction sees it: precision, sign, shrinkage of entries, pre-clipping."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spectrim.operators import DEFAULT_SHRINK_FACTOR, entry_scale, smooth_shrink, soft_clip
from spectrim.optim.layout import Layout, matrices

__all__ = ["map_matrices", "prepare", "shrink_entries", "squared_norm"]


def prepare(grad: Tensor, options: Mapping[str, Any], layout: Layout) -> Tensor:
    """The gradient as the base direction takes it, in float32 or better. May be the gradient itself, which is never
    written to.

    Args:
        grad: of the parameter's shape.
        options: the effective options of the parameter: "maximize", "shrink", "shrink_form", "pre_clip" and "split".
        layout: how the parameter is read as matrices; scales and thresholds are per logical matrix.
    """
    exact = grad.to(torch.promote_types(grad.dtype, torch.float32))
    if options["maximize"]:
        exact = -exact
    if options["shrink"] is not None and options["shrink_at"] == "gradient":
        exact = shrink_entries(exact, options, layout)
    if options["pre_clip"] is not None and layout != "vector":
        exact = map_matrices(lambda G: soft_clip(G, options["pre_clip"]), exact, layout, options["split"])
    return exact


def squared_norm(grad: Tensor) -> Tensor:
    """The sum of squares as a scalar, in float32 or better: one pass, and not finite where any entry is not.

    Nor where the sum itself overflows. Such a gradient counts as non-finite too: second moments could not hold it.
    """
    exact = grad.to(torch.promote_types(grad.dtype, torch.float32))
    if exact.is_contiguous():
        # A product of BLAS, which reads at the speed of memory; torch's norms take several times as long on a host.
        flat = exact.view(-1)
        return torch.dot(flat, flat)
    return exact.square().sum()


def shrink_entries(tensor: Tensor, options: Mapping[str, Any], layout: Layout) -> Tensor:
    """Shrink the entries that are large against their logical matrix's scale; a new tensor."""
    factor = DEFAULT_SHRINK_FACTOR if options["shrink"] == "auto" else float(options["shrink"])
    return map_matrices(
        lambda G: smooth_shrink(G, factor * entry_scale(G), form=options["shrink_form"]),
        tensor,
        layout,
        options["split"],
    )


def map_matrices(
    function: Callable[[Tensor], Tensor], tensor: Tensor, layout: Layout, split: Sequence[int] | None
) -> Tensor:
    """Apply a function to every logical matrix of a tensor, or to the tensor where it is a vector."""
    if layout == "vector" or (split is None and layout in ("matrix", "stack")):
        return function(tensor)
    result = torch.empty_like(tensor)
    for source, target in zip(matrices(tensor, layout, split), matrices(result, layout, split), strict=True):
        target.copy_(function(source))
    return result
