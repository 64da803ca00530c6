"""Rounding to bfloat16: to nearest, or up or down by chance so that the mean is exact.

To nearest would lose every increment below half a unit in the last of eight bits, and weights and momenta are sums of
such increments. The chance comes from a function of (seed, step, position), not from a generator: the same in a resumed
run, on any device, in eager code and in a kernel, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["noise", "write_rounded"]

#: Which bits of the noise round what: the two moments share one draw, weights have one of their own.
LOW, HIGH, SECOND = 0, 1, 2

MASK = 0xFFFFFFFF
#: Entries rounded at a time: the noise is made in int64, and should not take a matrix's room several times over.
CHUNK = 2**22


def write_rounded(target: Tensor, exact: Tensor, seed: int | None, step: Tensor | None, lane: int) -> None:
    """Write numbers into a tensor of any dtype; with a seed, and in bfloat16, rounded by chance, else to nearest.

    Args:
        exact: of the target's shape. An entry that bfloat16 has exactly is kept exactly.
        seed: 0 to 2^63 − 1.
        step: None, or a scalar that changes the noise from step to step.
        lane: LOW, HIGH or SECOND.
    """
    if seed is None or target.dtype != torch.bfloat16:
        target.copy_(exact)
        return
    dense = target.is_contiguous()
    # Positions are counted in the order of memory, as a kernel counts them.
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
    """A vector of a tensor's entries, in the order in which ``like``, which is dense, has them in memory."""
    strides, sizes = like.stride(), like.shape
    order = sorted(range(like.ndim), key=lambda dim: (-strides[dim], -sizes[dim]))
    return tensor.permute(order).reshape(-1)


def noise(like: Tensor, seed: int, step: Tensor | None, lane: int, begin: int = 0) -> Tensor:
    """Uniform integers of 16 bits for the positions from ``begin`` on, as an int64 vector."""
    position = torch.arange(begin, begin + like.numel(), device=like.device)
    count = torch.zeros((), dtype=torch.int64, device=like.device) if step is None else step.reshape(()).long()
    key = _mixed(_mixed(_mixed((count & MASK) ^ (seed & MASK)) ^ (seed >> 32)) + lane // SECOND)
    draw = _mixed(_mixed((position & MASK) ^ key) ^ _mixed((position >> 32) + key))
    return draw >> 16 if lane == HIGH else draw & 0xFFFF


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32 bits, half of which any change of its input changes (the constants are those of lowbias32)."""
    x = x & MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def seed_of(seeds: Sequence[int] | None, index: int) -> int | None:
    """The seed of one tensor, where there are any."""
    return None if seeds is None else seeds[index]
