"""Costs of the Triton operators, for tools that count launches but cannot look into an opaque operator.

``COSTS["spectrim::name"]`` takes the operator's arguments, which may be fake tensors. Importing a module of
:mod:`spectrim.kernels.device` adds the entries of its operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ["COSTS", "Cost", "entrywise_cost", "size"]


class Cost(NamedTuple):
    """The cost of one call: launches, including uploads; bytes read and written; FLOPs by dtype."""

    launches: int
    bytes: int
    flops: dict[str, int]


COSTS: dict[str, Callable[..., Cost]] = {}


def size(*lists: Sequence[Tensor]) -> int:
    """The bytes of all tensors in the lists."""
    return sum(tensor.numel() * tensor.element_size() for tensors in lists for tensor in tensors)


def entrywise_cost(read: Sequence[Sequence[Tensor]], written: Sequence[Sequence[Tensor]]) -> Cost:
    """The cost of an operation over lists: one upload and one kernel for each combination of dtypes."""
    kinds = {tuple(tensor.dtype for tensor in tensors) for tensors in zip(*read, *written, strict=True)}
    return Cost(2 * len(kinds), size(*read) + size(*written), {})
