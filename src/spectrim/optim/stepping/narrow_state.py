"""Stochastic rounding, for state that is kept in bfloat16.

Rounding to nearest would lose every increment below half a unit in the last of eight bits, and a momentum with a
decay near one is a sum of such increments. Rounding up with the probability of the part that is cut off keeps them
on average.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["round_stochastically_"]

BLOCK = 2**18  # entries that a host rounds at a time, so that the random bits never take a matrix's room


def round_stochastically_(target: Tensor, source: Tensor, seed: int) -> None:
    """Write float32 numbers into a bfloat16 tensor, rounding up or down so that the mean is exact.

    Args:
        target: bfloat16, of the source's shape.
        source: float32, finite.
        seed: the result is a function of the source and this number alone; no global generator is involved.
    """
    generator = torch.Generator(source.device).manual_seed(seed)
    if source.is_contiguous() and target.is_contiguous():
        size = BLOCK if source.device.type == "cpu" else max(1, source.numel())
        blocks = zip(torch.split(source.view(-1), size), torch.split(target.view(-1), size), strict=True)
    else:
        blocks = zip([source.contiguous()], [target], strict=True)
    for exact, rounded in blocks:
        # bfloat16 is the upper half of a float32: adding random bits to the lower half carries over with just the right
        # odds.
        bits = _random_halves(exact.numel(), generator).view(exact.shape)
        bits.add_(exact.view(torch.int32)).bitwise_and_(-(1 << 16))
        rounded.copy_(bits.view(torch.float32))


def _random_halves(count: int, generator: torch.Generator) -> Tensor:
    """Random numbers of 16 bits as int32: a draw of 64 bits makes four, and drawing is what takes the time."""
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=generator.device)
    words.random_(-(1 << 63), None, generator=generator)
    return words.view(torch.int16)[:count].to(torch.int32).bitwise_and_(0xFFFF)
