"""Strided copies between flat tensors, which assemble matrices from shards and divide them again.

Blocks of one shape at even distances are merged into one copy, so that an even sharding over many ranks takes as many
copies as one over two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spectrim.distributed.intervals import Intervals, count
from spectrim.kernels.lists import grouped

__all__ = ["Copy", "copies_of_region", "copy_all", "is_plain", "merged"]


class Copy(NamedTuple):
    """A copy of a block of entries from one flat tensor to another; offsets and strides count entries."""

    shape: tuple[int, ...]
    source_strides: tuple[int, ...]
    target_strides: tuple[int, ...]
    source: int
    target: int

    def moved(self, *, source: int = 0, target: int = 0) -> Copy:
        """The same copy at larger offsets."""
        return self._replace(source=self.source + source, target=self.target + target)

    def reversed(self) -> Copy:
        """The copy in the opposite direction."""
        return Copy(self.shape, self.target_strides, self.source_strides, self.target, self.source)


def copies_of_region(shape: Sequence[int], region: Sequence[Intervals]) -> list[Copy]:
    """The copies from a region of a contiguous tensor of this shape to a contiguous tensor of the region's size."""
    strides = _strides(shape)
    local = _strides([count(runs) for runs in region])
    offsets = [list(itertools.accumulate((stop - start for start, stop in runs), initial=0)) for runs in region]
    found = []
    for places in itertools.product(*(range(len(runs)) for runs in region)):
        runs = [each[place] for each, place in zip(region, places, strict=True)]
        source = sum(start * stride for (start, _), stride in zip(runs, strides, strict=True))
        target = sum(o[place] * stride for o, place, stride in zip(offsets, places, local, strict=True))
        found.append(Copy(tuple(stop - start for start, stop in runs), strides, local, source, target))
    return found


def merged(copies: Sequence[Copy]) -> list[Copy]:
    """Merge copies into fewer ones with the same effect."""
    found = list(copies)
    while len(fewer := _merged_once(found)) < len(found):
        found = fewer
    return found


def _merged_once(copies: Sequence[Copy]) -> list[Copy]:
    found = []
    for same in grouped(copies, lambda copy: copy[:3]).values():
        start = 0
        while start < len(same):
            stop, step = start + 1, (0, 0)
            while stop < len(same):
                between = (same[stop].source - same[stop - 1].source, same[stop].target - same[stop - 1].target)
                if min(between) < 0 or (stop > start + 1 and between != step):
                    break
                stop, step = stop + 1, between
            first, many = same[start], stop - start
            if many > 1:
                first = Copy(
                    (many, *first.shape),
                    (step[0], *first.source_strides),
                    (step[1], *first.target_strides),
                    first.source,
                    first.target,
                )
            found.append(first)
            start = stop
    return found


def is_plain(copy: Copy) -> bool:
    """True if source and target are contiguous."""
    strides = _strides(copy.shape)
    pairs = [(copy.source_strides, strides), (copy.target_strides, strides)]
    return all(
        found == wanted
        for having, plain in pairs
        for found, wanted, size in zip(having, plain, copy.shape, strict=True)
        if size > 1
    )


def copy_all(copies: Sequence[tuple[Tensor, Tensor, Copy]]) -> None:
    """Run copies (source, target, copy) between contiguous tensors, whose dtypes may differ."""
    if not copies:
        return
    sources = [_view(source, copy.shape, copy.source_strides, copy.source) for source, _, copy in copies]
    targets = [_view(target, copy.shape, copy.target_strides, copy.target) for _, target, copy in copies]
    torch._foreach_copy_(targets, sources)


def _view(tensor: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Tensor:
    return tensor.as_strided(shape, strides, tensor.storage_offset() + offset)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
