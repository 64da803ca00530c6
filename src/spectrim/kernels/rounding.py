"""Rounding to bfloat16: to nearest, or stochastically so that the mean is exact.

bfloat16 has eight bits of precision. Rounding to nearest would lose increments below half a unit in the last bit, and
weights and momenta are sums of such increments. The random bits are a function of (seed, step, position): they are the
same in a resumed run, on every device, in eager code and in kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["noise", "write_rounded"]

#: Lanes of the random bits: the two moments share one draw, weights have their own.
LOW, HIGH, SECOND = 0, 1, 2

MASK = 0xFFFFFFFF
#: Entries rounded at a time, which bounds the memory of the int64 random bits.
CHUNK = 2**22


def write_rounded(target: Tensor, exact: Tensor, seed: int | None, step: Tensor | None, lane: int) -> None:
    """Write numbers into a tensor, rounded stochastically if it is bfloat16 and there is a seed, else to nearest.

    Args:
        exact: of the target's shape. Numbers that bfloat16 can represent are not changed.
        seed: 0 to 2^63 − 1.
        step: None, or a scalar that changes the random bits from step to step.
        lane: LOW, HIGH or SECOND.
    """
    if seed is None or target.dtype != torch.bfloat16:
        target.copy_(exact)
        return
    dense = target.is_contiguous()
    # Positions count in memory order, as in kernels.
    rounded = target.view(-1) if dense else torch.empty(target.numel(), dtype=target.dtype, device=target.device)
    source = in_memory_order(exact.float(), target)
    for begin in range(0, source.numel(), CHUNK):
        part = source[begin : begin + CHUNK]
        bits = part.view(torch.int32).long() & MASK
        bits = (bits + noise(part, seed, step, lane, begin)) & 0xFFFF0000
        chosen = torch.where(bits >= 2**31, bits - 2**32, bits).int().view(torch.float32)
        rounded[begin : begin + CHUNK] = torch.where(part.isfinite(), chosen, part)
    if not dense:
        target.copy_(rounded.as_strided(target.shape, target.stride()))


def in_memory_order(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor's entries as a vector, in the memory order of ``like``, which is dense."""
    strides, sizes = like.stride(), like.shape
    order = sorted(range(like.ndim), key=lambda dim: (-strides[dim], -sizes[dim]))
    return tensor.permute(order).reshape(-1)


def noise(like: Tensor, seed: int, step: Tensor | None, lane: int, begin: int = 0) -> Tensor:
    """Uniform 16-bit integers for the positions from ``begin``, as an int64 vector."""
    position = torch.arange(begin, begin + like.numel(), device=like.device)
    count = torch.zeros((), dtype=torch.int64, device=like.device) if step is None else step.reshape(()).long()
    key = _mixed(_mixed(_mixed((count & MASK) ^ (seed & MASK)) ^ (seed >> 32)) + lane // SECOND)
    draw = _mixed(_mixed((position & MASK) ^ key) ^ _mixed((position >> 32) + key))
    return draw >> 16 if lane == HIGH else draw & 0xFFFF


def _mixed(x: Tensor) -> Tensor:
    """A bijective hash of 32-bit numbers, with the constants of lowbias32."""
    x = x & MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def seed_of(seeds: Sequence[int] | None, index: int) -> int | None:
    """The seed of one tensor, or None without seeds."""
    return None if seeds is None else seeds[index]
