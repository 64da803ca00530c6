"""What the operators of this package cost, for tools that count launches and cannot look into an opaque operator.

``COSTS["spectrim::name"]`` is called with the arguments of the operator as the dispatcher has them, fake or not. The
entries are made as the operators are, when a module of :mod:`spectrim.kernels.device` is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ["COSTS", "Cost", "entrywise_cost", "size"]


class Cost(NamedTuple):
    """Of one call: launches, counting an upload from pinned memory; bytes read and written; FLOPs by dtype."""

    launches: int
    bytes: int
    flops: dict[str, int]


COSTS: dict[str, Callable[..., Cost]] = {}


def size(*lists: Sequence[Tensor]) -> int:
    """The bytes of all tensors of some lists."""
    return sum(tensor.numel() * tensor.element_size() for tensors in lists for tensor in tensors)


def entrywise_cost(read: Sequence[Sequence[Tensor]], written: Sequence[Sequence[Tensor]]) -> Cost:
    """Of an operation over lists: an upload and a kernel for each combination of dtypes."""
    kinds = {tuple(tensor.dtype for tensor in tensors) for tensors in zip(*read, *written, strict=True)}
    return Cost(2 * len(kinds), size(*read) + size(*written), {})
