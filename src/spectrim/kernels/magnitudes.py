"""Reductions over all gradients in one pass: the largest magnitude of every tensor, and the mean root of every matrix.

The first shows entries that are not finite; the second gives the entry scale for shrinkage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .choice import kernel_runs
from .lists import listed, working
from .runs import Run, check_runs, flat, parts

__all__ = ["largest_magnitudes", "magnitudes_and_roots", "mean_roots"]


def largest_magnitudes(tensors: Sequence[Tensor]) -> Tensor:
    """max |entry| of every tensor, as one vector in float32 or wider; zero if the tensor is empty, NaN if an entry is.

    Unlike a norm, it does not overflow for finite entries.

    Args:
        tensors: at least one, on one device, of any floating-point dtypes.
    """
    if kernel_runs("largest_magnitudes", tensors):
        from .device.screen import screen

        return screen(list(tensors), None, None, True, False)[0]  # type: ignore[no-any-return]
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:
        return torch.zeros(len(tensors), dtype=dtype, device=tensors[0].device)
    if filled[0].device.type == "cpu":
        found = iter([_largest_magnitude(tensor).to(dtype) for tensor in filled])
    else:
        found = iter(torch._foreach_norm(filled, math.inf, dtype=dtype))
    if len(filled) == len(tensors):
        return torch.stack(tuple(found))
    zero = torch.zeros((), dtype=dtype, device=tensors[0].device)
    return torch.stack([next(found) if tensor.numel() else zero for tensor in tensors])


def _largest_magnitude(tensor: Tensor) -> Tensor:
    """The largest magnitude of a tensor on the CPU, whose maximum norm takes five times as long as this."""
    least, largest = tensor.aminmax()
    return torch.maximum(-least, largest)


def mean_roots(
    tensors: Sequence[Tensor], *, runs: Sequence[Run] | None = None, counts: Sequence[int] | None = None
) -> Tensor:
    """The mean of √|entry| over every logical matrix, as one vector. Its square over 0.6760 is the entry scale.

    Args:
        tensors: at least one, on one device, of any floating-point dtypes.
        runs: the logical matrices, which need not cover the tensors; without runs, every tensor is one matrix.
        counts: divisors instead of the numbers of entries, one for each matrix. With the count of the whole matrix, a
            shard gives its share of the mean, and the shares add up.

    Returns:
        (R,), float32 or wider; zero for an empty matrix. The result is deterministic.
    """
    _check(tensors, runs, counts)
    if kernel_runs("mean_roots", tensors):
        from .device.screen import screen

        return screen(list(tensors), flat(runs), listed(counts), False, True)[1]  # type: ignore[no-any-return]
    matrices = parts(tensors, runs)
    if not matrices:
        return torch.zeros(0, device=tensors[0].device)
    lengths = [max(1, matrix.numel()) for matrix in matrices] if counts is None else [max(1, count) for count in counts]
    # Divided by Python numbers, which need no upload.
    return torch.stack(
        [matrix.to(working(matrix)).abs().sqrt().sum() / n for matrix, n in zip(matrices, lengths, strict=True)]
    )


def magnitudes_and_roots(
    tensors: Sequence[Tensor], *, runs: Sequence[Run] | None = None, counts: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`largest_magnitudes` of all tensors and :func:`mean_roots` of all runs; a kernel does both in one pass."""
    _check(tensors, runs, counts)
    if kernel_runs("magnitudes_and_roots", tensors):
        from .device.screen import screen

        return screen(list(tensors), flat(runs), listed(counts), True, True)  # type: ignore[no-any-return]
    return largest_magnitudes(tensors), mean_roots(tensors, runs=runs, counts=counts)


def _check(tensors: Sequence[Tensor], runs: Sequence[Run] | None, counts: Sequence[int] | None) -> None:
    if runs is not None:
        check_runs(tensors, runs, whole=False)
    matrices = len(tensors if runs is None else runs)
    if counts is not None and len(counts) != matrices:
        raise ValueError(f"{len(counts)} counts for {matrices} matrices: expected one for each")
