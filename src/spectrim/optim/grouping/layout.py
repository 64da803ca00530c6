"""Views of parameters as matrices.

Operators need the logical matrix of a weight, m outputs x n inputs. Some layers store the transpose, a stack of
experts or a convolution kernel, which a layout describes; or several projections in one tensor, which ``split``
describes. Both are plain values of a param group, so that a ``state_dict`` can hold them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = [
    "INTERLEAVED",
    "LAYOUTS",
    "Layout",
    "Split",
    "default_layout",
    "matrices",
    "matrix_shapes",
    "put_back",
    "sizes_of",
]

Layout = Literal["vector", "matrix", "transposed", "stack", "transposed_stack", "flatten"]
LAYOUTS: tuple[str, ...] = get_args(Layout)

#: The sizes, along the outputs, of consecutive projections; or "interleaved" followed by the sizes of one turn.
Split = Sequence[int | str]
INTERLEAVED = "interleaved"

_DIMENSIONS = {"matrix": 2, "transposed": 2, "stack": 3, "transposed_stack": 3}


def default_layout(shape: Sequence[int]) -> Layout:
    """The layout by number of dimensions: 2-D is a matrix, 3-D a stack of matrices, all else a vector."""
    if len(shape) == 2:
        return "matrix"
    if len(shape) == 3:
        return "stack"
    return "vector"


def matrices(tensor: Tensor, layout: Layout, split: Split | None = None, *, leading: int = 0) -> list[Tensor]:
    """View a tensor as its logical matrices; writing to a view writes to the tensor.

    Args:
        tensor: any tensor of a parameter's shape (parameter, gradient, momentum), or a stack of them.
        layout: "matrix" (m, n); "transposed" (n, m); "stack" (E, m, n); "transposed_stack" (E, n, m);
            "flatten" (m, ...) with the trailing dimensions joined; "vector" has no matrices.
        split: sizes along the outputs m, for projections stored as one tensor; their sum must be m. If "interleaved"
            comes first, the projections' rows alternate, with these numbers of rows in one turn; their sum must divide
            m.
        leading: number of leading dimensions that stack whole parameters.

    Returns:
        Views of shape (..., m, n), one for each part of the split, or an empty list for a vector. Interleaved parts are
        copies, which :func:`put_back` writes back.

    Raises:
        ValueError: the layout is unknown, or layout or split do not fit the shape.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: expected one of {', '.join(map(repr, LAYOUTS))}")
    if layout == "vector":
        return []
    whole = _whole(tensor, layout, leading)
    if split is None:
        return [whole]
    sizes, interleaved = sizes_of(split)
    outputs, period = whole.shape[-2], sum(sizes)
    shape = tuple(tensor.shape[leading:])
    if any(size < 1 for size in sizes) or not sizes:
        raise ValueError(f"split={tuple(split)}: sizes must be positive")
    if interleaved:
        if outputs % period:
            raise ValueError(
                f"split={tuple(split)}: interleaved sizes must sum to a divisor of {outputs}, the outputs of {shape}"
            )
        # Always copies, even if a view is possible, so that put_back need not distinguish the two.
        copies = [part.clone(memory_format=torch.contiguous_format) for part in _turns(whole, sizes)]
        return [copy.flatten(-3, -2) for copy in copies]
    if period != outputs:
        raise ValueError(f"split={tuple(split)}: sizes must sum to {outputs}, the outputs of shape {shape}")
    return list(torch.split(whole, list(sizes), dim=-2))


def put_back(parts: Sequence[Tensor], tensor: Tensor, layout: Layout, split: Split | None, *, leading: int = 0) -> None:
    """Write parts from :func:`matrices` back to the tensor if they are copies."""
    if split is None or layout == "vector":
        return
    sizes, interleaved = sizes_of(split)
    if interleaved:
        for target, part in zip(_turns(_whole(tensor, layout, leading), sizes), parts, strict=True):
            target.copy_(part.reshape(target.shape))


def sizes_of(split: Split) -> tuple[tuple[int, ...], bool]:
    """The sizes of a split, and True if it is interleaved."""
    interleaved = len(split) > 0 and split[0] == INTERLEAVED
    return tuple(int(size) for size in (split[1:] if interleaved else split)), interleaved


def _turns(whole: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Views (..., periods, size, n) of interleaved parts."""
    period = sum(sizes)
    turns = whole.shape[-2] // period
    rows: Tensor = whole.unflatten(-2, (turns, period))  # type: ignore[no-untyped-call]
    return list(torch.split(rows, list(sizes), dim=-2))


def _whole(tensor: Tensor, layout: Layout, leading: int) -> Tensor:
    """The view (..., m, n) of a tensor, before any split."""
    shape = tuple(tensor.shape[leading:])
    wanted = _DIMENSIONS.get(layout)
    if wanted is not None and len(shape) != wanted:
        raise ValueError(f"layout={layout!r} needs {wanted} dimensions, got shape {shape}")
    if layout == "flatten" and len(shape) < 2:
        raise ValueError(f"layout='flatten' needs at least two dimensions, got shape {shape}")
    if layout in ("transposed", "transposed_stack"):
        return tensor.transpose(-1, -2)
    if layout == "flatten":
        # `view` raises for channels_last kernels, which cannot be flattened without a copy.
        return tensor.view(*tensor.shape[: leading + 1], math.prod(shape[1:]))
    return tensor


def matrix_shapes(shape: Sequence[int], layout: Layout, split: Split | None = None) -> list[tuple[int, ...]]:
    """The shapes of the logical matrices of a parameter of this shape."""
    return [tuple(view.shape) for view in matrices(torch.empty(tuple(shape), device="meta"), layout, split)]
