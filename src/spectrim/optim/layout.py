"""How a parameter's storage is read as matrices.

An operator needs the logical matrix of a weight: m outputs x n inputs. Some layers store the transpose, a stack of
experts, a convolution kernel or several projections in one tensor. A layout names the first three, ``split`` the
last; both are plain values of a param group, so that they survive a ``state_dict``. Relied on by the optimizer and
by the groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["LAYOUTS", "Layout", "default_layout", "matrices", "matrix_shapes"]

Layout = Literal["vector", "matrix", "transposed", "stack", "transposed_stack", "flatten"]
LAYOUTS: tuple[str, ...] = get_args(Layout)

_DIMENSIONS = {"matrix": 2, "transposed": 2, "stack": 3, "transposed_stack": 3}


def default_layout(shape: Sequence[int]) -> Layout:
    """The layout of a parameter of which nothing is known: 2-D is a matrix, 3-D a stack of them, the rest vectors."""
    if len(shape) == 2:
        return "matrix"
    if len(shape) == 3:
        return "stack"
    return "vector"


def matrices(tensor: Tensor, layout: Layout, split: Sequence[int] | None = None, *, leading: int = 0) -> list[Tensor]:
    """View a tensor as its logical matrices; writing to a view writes to the tensor.

    Args:
        tensor: any tensor of a parameter's shape (the parameter, its gradient, its momentum), or several of them
            stacked.
        layout: "matrix" (m, n); "transposed" (n, m); "stack" (E, m, n); "transposed_stack" (E, n, m);
            "flatten" (m, ...) with the trailing dimensions joined; "vector" has no matrices.
        split: sizes along the outputs m, for projections stored as one tensor. Their sum must be m.
        leading: how many leading dimensions stack whole parameters.

    Returns:
        Views of shape (..., m, n), one for each part of the split, or an empty list for a vector.

    Raises:
        ValueError: unknown layout, or a shape that the layout or the split does not fit.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: expected one of {', '.join(map(repr, LAYOUTS))}")
    if layout == "vector":
        return []
    shape = tuple(tensor.shape[leading:])
    wanted = _DIMENSIONS.get(layout)
    if wanted is not None and len(shape) != wanted:
        raise ValueError(f"layout={layout!r} needs {wanted} dimensions, got shape {shape}")
    if layout == "flatten" and len(shape) < 2:
        raise ValueError(f"layout='flatten' needs at least two dimensions, got shape {shape}")
    whole = tensor
    if layout in ("transposed", "transposed_stack"):
        whole = tensor.transpose(-1, -2)
    elif layout == "flatten":
        # A view even of channels_last kernels, whose trailing dimensions cannot be joined, would need a copy: `view`
        # refuses.
        whole = tensor.view(*tensor.shape[: leading + 1], math.prod(shape[1:]))
    if split is None:
        return [whole]
    outputs = whole.shape[-2]
    if any(size < 1 for size in split) or sum(split) != outputs:
        raise ValueError(
            f"split={tuple(split)}: sizes must be positive and sum to {outputs}, the outputs of shape {shape}"
        )
    return list(torch.split(whole, list(split), dim=-2))


def matrix_shapes(shape: Sequence[int], layout: Layout, split: Sequence[int] | None = None) -> list[tuple[int, ...]]:
    """The shapes of the logical matrices of a parameter of this shape, without touching one."""
    return [tuple(view.shape) for view in matrices(torch.empty(tuple(shape), device="meta"), layout, split)]
