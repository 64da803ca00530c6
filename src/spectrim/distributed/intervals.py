"""Sets of indices along one dimension, as sorted intervals.

A shard is usually one interval. Strided shards, which FSDP2 makes over tensor parallelism, are several.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["Intervals", "chunk", "count", "flattened", "joined", "overlaps", "position", "put", "take", "within"]

#: Sorted, disjoint, non-empty (start, stop) pairs.
Intervals = tuple[tuple[int, int], ...]


def count(runs: Intervals) -> int:
    """The number of indices."""
    return sum(stop - start for start, stop in runs)


def pick(runs: Intervals, start: int, stop: int) -> Intervals:
    """The indices at positions ``start`` to ``stop`` of a set."""
    picked: list[tuple[int, int]] = []
    offset = 0
    for first, last in runs:
        low, high = max(start - offset, 0), min(stop - offset, last - first)
        if low < high:
            picked.append((first + low, first + high))
        offset += last - first
    return joined(picked)


def chunk(runs: Intervals, chunks: int, index: int) -> Intervals:
    """One chunk of a set, by torch.chunk's rule: chunks have ⌈size/chunks⌉ indices, except the last ones."""
    size = -(-count(runs) // chunks)
    return pick(runs, size * index, size * (index + 1))


def joined(pairs: Sequence[tuple[int, int]]) -> Intervals:
    """Sort intervals, and join adjacent ones."""
    result: list[tuple[int, int]] = []
    for start, stop in sorted(pairs):
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], stop)
        elif start < stop:
            result.append((start, stop))
    return tuple(result)


def within(runs: Intervals, start: int, stop: int) -> Intervals:
    """The indices of a set in ``[start, stop)``, relative to ``start``."""
    clipped = [(max(first, start) - start, min(last, stop) - start) for first, last in runs]
    return tuple((first, last) for first, last in clipped if first < last)


def overlaps(mine: Intervals, other: Intervals) -> Iterator[tuple[slice, slice]]:
    """The common indices of two sets, as pairs of slices of positions in the first and the second set, in order."""
    ours, i = 0, 0
    theirs, j = 0, 0
    while i < len(mine) and j < len(other):
        low, high = max(mine[i][0], other[j][0]), min(mine[i][1], other[j][1])
        if low < high:
            a, b = ours + low - mine[i][0], theirs + low - other[j][0]
            yield slice(a, a + high - low), slice(b, b + high - low)
        if mine[i][1] <= other[j][1]:
            ours += mine[i][1] - mine[i][0]
            i += 1
        else:
            theirs += other[j][1] - other[j][0]
            j += 1


def flattened(dimensions: Sequence[Intervals], shape: Sequence[int]) -> Intervals:
    """The indices along the flattened dimensions of a shape, from the sets along each dimension."""
    total: Intervals = ((0, 1),)
    for runs, size in zip(dimensions, shape, strict=True):
        if runs == ((0, size),):
            total = tuple((start * size, stop * size) for start, stop in total)
            continue
        indices = itertools.chain.from_iterable(range(start, stop) for start, stop in total)
        total = joined([(index * size + first, index * size + last) for index in indices for first, last in runs])
    return total


def take(tensor: Tensor, region: Sequence[Intervals]) -> Tensor:
    """The entries of a tensor at the product of one set for each dimension; a view if every set is one interval."""
    for dim, runs in enumerate(region):
        if runs == ((0, tensor.shape[dim]),):
            continue
        parts = [tensor.narrow(dim, start, stop - start) for start, stop in runs]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts, dim) if parts else tensor.narrow(dim, 0, 0)
    return tensor


def put(tensor: Tensor, region: Sequence[Intervals], values: Tensor) -> None:
    """Write values at the product of one set for each dimension."""
    for runs in itertools.product(*region):
        target, source = tensor, values
        for dim, (start, stop) in enumerate(runs):
            target = target.narrow(dim, start, stop - start)
            source = source.narrow(dim, position(region[dim], start), stop - start)
        target.copy_(source)


def position(runs: Intervals, index: int) -> int:
    """The number of indices before this one."""
    return sum(min(stop, index) - start for start, stop in runs if start < index)
