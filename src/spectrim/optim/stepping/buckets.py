"""Stacks of parameters of one rule and shape, and buckets of stacks that one call of an operator works on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Generic

import torch
from torch import Tensor

from spectrim.kernels.lists import grouped
from spectrim.optim.grouping.layout import Layout, Split, matrices, put_back
from spectrim.optim.memory import packed, stack_bytes
from spectrim.optim.spectral.base import Part
from spectrim.optim.stepping.entries import AnyEntry, Entry

__all__ = ["BUCKET_BYTES", "Stack", "bucket_bytes", "buckets", "parts_of"]

#: The most bytes of matrices, in float32, in one bucket; a single matrix may exceed it. On the host only small matrices
#: gain from batching, since a large one fills the cores. Devices not listed use :mod:`~spectrim.optim.memory`.
BUCKET_BYTES = {"cpu": 4 * 2**20}


class Stack(Generic[AnyEntry]):
    """Parameters of one structure, layout, shape, dtype and device.

    Attributes:
        entries: the parameters.
        tensor: (E, *shape), first their directions, later their updates, each in its parameter's layout.
    """

    def __init__(self, entries: list[AnyEntry]) -> None:
        self.entries = entries
        first = entries[0]
        self.rule, self.layout, self.split = first.rule, first.layout, first.split
        self.shape = tuple(first.parameter.shape)
        self.dtype = torch.promote_types(first.parameter.dtype, torch.float32)
        self._tensor: Tensor | None = None

    @property
    def tensor(self) -> Tensor:
        """The stack's memory, allocated at first use."""
        if self._tensor is None:
            like = self.entries[0].parameter
            self._tensor = torch.empty((len(self.entries), *self.shape), dtype=self.dtype, device=like.device)
        return self._tensor

    def parts(self) -> list[Part]:
        """The logical matrices of the stack as views, or copies that :meth:`put_back` writes; empty for vectors."""
        return parts_of(self.tensor, self.layout, self.split)

    def put_back(self, parts: Sequence[Part]) -> None:
        """Write :meth:`parts` back to the stack if they are copies."""
        put_back([part.matrices for part in parts], self.tensor, self.layout, self.split, leading=1)


def parts_of(tensor: Tensor, layout: Layout, split: Split | None) -> list[Part]:
    """The logical matrices of whole parameters (E, *shape) as parts (E', m, n), where E' includes the experts.

    Interleaved parts are copies: see :func:`~spectrim.optim.grouping.layout.put_back`.
    """
    return [
        Part(matrices=view.flatten(0, -3) if view.ndim > 3 else view)
        for view in matrices(tensor, layout, split, leading=1)
    ]


def buckets(entries: Sequence[AnyEntry], limit: int | None = None) -> Iterator[list[Stack[AnyEntry]]]:
    """Group entries of one rule structure, skip flag and shape into stacks, and stacks into buckets of ``limit`` bytes.

    Stacks are sorted by their matrices' smaller side, so that an operator can iterate on equal sides together.
    """

    def structure(entry: AnyEntry) -> tuple[Any, ...]:
        return (*entry.rule.structure, entry.parameter.dtype, entry.parameter.device, id(entry.found))

    def shape(entry: AnyEntry) -> tuple[Any, ...]:
        return entry.layout, None if entry.split is None else tuple(entry.split), tuple(entry.parameter.shape)

    for alike in grouped(entries, structure).values():
        shapes = sorted(grouped(alike, shape).values(), key=lambda same: _small_side(same[0]))
        most = bucket_bytes(alike[0].parameter) if limit is None else limit
        for bucket in packed(shapes, lambda same: 4 * same[0].parameter.numel(), most):
            yield [Stack(same) for same in bucket]


def bucket_bytes(tensor: Tensor) -> int:
    """The most bytes in a bucket on a tensor's device."""
    return BUCKET_BYTES.get(tensor.device.type, stack_bytes())


def _small_side(entry: Entry) -> int:
    shape = entry.parameter.shape
    if entry.layout == "vector":
        return 0
    if entry.layout == "flatten":
        return min(shape[0], math.prod(shape[1:]))
    return min(shape[-2:])
