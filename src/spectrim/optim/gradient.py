"""What happens to a gradient before the base direction sees it: precision, sign, shrinkage of entries, pre-clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spectrim.native.entries import sum_squares
from spectrim.native.library import serves
from spectrim.operators import DEFAULT_SHRINK_FACTOR, entry_scale, smooth_shrink, soft_clip
from spectrim.operators._stack import reading_is_free
from spectrim.operators.shrink import HOST_BLOCK, shrink_block
from spectrim.optim.layout import Layout, matrices

__all__ = [
    "map_matrices",
    "prepare",
    "shrink_entries",
    "shrink_factor",
    "shrinks_in_blocks",
    "shrunk_blocks",
    "squared_norm",
]


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
    if serves(exact):
        return torch.tensor(sum_squares(exact), dtype=torch.float32)
    if exact.is_contiguous():
        # A product of BLAS, which reads at the speed of memory; torch's norms take several times as long on a host.
        flat = exact.view(-1)
        return torch.dot(flat, flat)
    return exact.square().sum()


def shrink_entries(tensor: Tensor, options: Mapping[str, Any], layout: Layout) -> Tensor:
    """Shrink the entries that are large against their logical matrix's scale; a new tensor."""
    factor = shrink_factor(options)
    return map_matrices(
        lambda G: smooth_shrink(G, factor * entry_scale(G), form=options["shrink_form"]),
        tensor,
        layout,
        options["split"],
    )


def shrinks_in_blocks(tensor: Tensor, options: Mapping[str, Any], layout: Layout) -> bool:
    """Whether :func:`shrunk_blocks` serves a parameter: contiguous and on the host, one scale for all its entries."""
    single = options["split"] is None and layout not in ("stack", "transposed_stack")
    return single and options["shrink_at"] == "gradient" and reading_is_free(tensor) and tensor.is_contiguous()


def shrunk_blocks(
    parameter: Tensor, grad: Tensor, *moments: Tensor, options: Mapping[str, Any]
) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of a parameter, its shrunk gradient and its moments, flat and in order; they fit the cache of a core.

    The block of the gradient is a scratch tensor, good until the next block is asked for.
    """
    tau = shrink_factor(options) * entry_scale(grad.view(-1)).item()
    scratch = grad.new_empty(min(HOST_BLOCK, grad.numel()))
    flat = [torch.split(tensor.detach().view(-1), HOST_BLOCK) for tensor in (parameter, grad, *moments)]
    for weight, block, *rest in zip(*flat, strict=True):
        out = scratch[: len(block)]
        shrink_block(block, tau, options["shrink_form"], out=out)
        yield weight, out, *rest


def shrink_factor(options: Mapping[str, Any]) -> float:
    """The factor on the entry scale that the option stands for."""
    return DEFAULT_SHRINK_FACTOR if options["shrink"] == "auto" else float(options["shrink"])


def map_matrices(
    function: Callable[[Tensor], Tensor], tensor: Tensor, layout: Layout, split: Sequence[int] | None
) -> Tensor:
    """Apply a function to every logical matrix of a tensor, or to the tensor where it is a vector."""
    if layout == "vector":
        return function(tensor.reshape(-1)).view_as(tensor)
    if split is None and layout in ("matrix", "stack"):
        return function(tensor)
    result = torch.empty_like(tensor)
    for source, target in zip(matrices(tensor, layout, split), matrices(result, layout, split), strict=True):
        target.copy_(function(source))
    return result
