"""Stochastic rounding of optimizer state to bfloat16.

bfloat16 has eight bits of precision. Rounding to nearest would lose increments below half a unit in the last bit, and a
momentum with a decay near one is a sum of such increments. Stochastic rounding preserves them on average.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["round_stochastically_"]

BLOCK = 2**18  # entries rounded at a time on the host, which bounds the memory of the random bits


def round_stochastically_(target: Tensor, source: Tensor, seed: int) -> None:
    """Write float32 numbers into a bfloat16 tensor, rounding up or down so that the mean is exact.

    Args:
        target: bfloat16, of the source's shape.
        source: float32, finite.
        seed: the result depends on the source and this number only, not on a global generator.
    """
    generator = torch.Generator(source.device).manual_seed(seed)
    if source.is_contiguous() and target.is_contiguous():
        size = BLOCK if source.device.type == "cpu" else max(1, source.numel())
        blocks = zip(torch.split(source.view(-1), size), torch.split(target.view(-1), size), strict=True)
    else:
        blocks = zip([source.contiguous()], [target], strict=True)
    for exact, rounded in blocks:
        # bfloat16 is the upper half of a float32. Random bits added to the lower half carry into the upper half with
        # the probability of rounding up.
        bits = _random_halves(exact.numel(), generator).view(exact.shape)
        bits.add_(exact.view(torch.int32)).bitwise_and_(-(1 << 16))
        rounded.copy_(bits.view(torch.float32))


def _random_halves(count: int, generator: torch.Generator) -> Tensor:
    """Random 16-bit numbers as int32. One 64-bit draw gives four of them, since drawing takes most of the time."""
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=generator.device)
    words.random_(-(1 << 63), None, generator=generator)
    return words.view(torch.int16)[:count].to(torch.int32).bitwise_and_(0xFFFF)
