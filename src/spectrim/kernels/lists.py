"""Which lists of tensors torch's fused kernels take, and how a step is skipped where they cannot be used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Found", "fused_serves", "held", "with_zeros"]

#: None, or a float32 scalar: 1 where the whole step is skipped, else 0.
Found = Tensor | None

FUSED_DEVICES = ("cpu", "cuda")


def fused_serves(*lists: Sequence[Tensor]) -> bool:
    """True if torch's fused kernels take these lists: they walk storage, so one dtype, one shape and one memory layout.

    A compiler cannot see into these kernels, and fuses the formula as well.
    """
    if torch.compiler.is_compiling():
        return False
    first = lists[0][0]
    dtype, device = first.dtype, first.device
    if dtype not in (torch.float32, torch.float64) or device.type not in FUSED_DEVICES:
        return False
    for tensors in zip(*lists, strict=True):
        shape, stride = tensors[0].shape, None
        if not tensors[0].is_contiguous():
            stride = tensors[0].stride()
            if not is_dense(tensors[0]):
                return False
        for tensor in tensors:
            if tensor.dtype != dtype or tensor.device != device or tensor.shape != shape or tensor.is_neg():
                return False
            if tensor.stride() != stride if stride else not tensor.is_contiguous():
                return False
    return True


def is_dense(tensor: Tensor) -> bool:
    """True if a tensor's entries fill one run of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def held(decay: float, found: Found) -> float | Tensor:
    """A decay that is 1 where the step is skipped: with a zero gradient the state then stays as it is."""
    if found is None:
        return decay
    # Float64, so that the float32 arithmetic it enters is that of the Python number.
    return torch.where(found > 0, torch.ones((), dtype=torch.float64, device=found.device), decay)


def with_zeros(tensors: Sequence[Tensor], found: Found) -> list[Tensor]:
    """The tensors, or zeros in their place where the step is skipped, whatever they hold."""
    if found is None:
        return list(tensors)
    skip = found > 0
    return [torch.where(skip, 0.0, tensor) for tensor in tensors]
