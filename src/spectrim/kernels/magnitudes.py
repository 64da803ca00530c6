"""The largest magnitude of every gradient: what screening for non-finite entries needs, in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["largest_magnitudes"]


def largest_magnitudes(tensors: Sequence[Tensor]) -> Tensor:
    """max |entry| of every tensor, as one vector in float32 or better; zero for an empty one, NaN where any entry is.

    The largest magnitude and not a norm, so that nothing finite overflows.

    Args:
        tensors: at least one, on one device, of any floating-point dtypes.
    """
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:
        return torch.zeros(len(tensors), dtype=dtype, device=tensors[0].device)
    found = iter(torch._foreach_norm(filled, math.inf, dtype=dtype))
    if len(filled) == len(tensors):
        return torch.stack(tuple(found))
    zero = torch.zeros((), dtype=dtype, device=tensors[0].device)
    return torch.stack([next(found) if tensor.numel() else zero for tensor in tensors])
