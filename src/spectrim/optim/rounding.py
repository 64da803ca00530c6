"""Stochastic rounding, for state that is kept in bfloat16.

Rounding to nearest would lose every increment below half a unit in the last of eight bits, and a momentum with a
decay near one is a sum of such increments. Rounding up with the probability of the part that is cut off keeps them
on average.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["round_stochastically_"]


def round_stochastically_(target: Tensor, source: Tensor, seed: int) -> None:
    """Write float32 numbers into a bfloat16 tensor, rounding up or down so that the mean is exact.

    Args:
        target: bfloat16, of the source's shape.
        source: float32, finite.
        seed: the result is a function of the source and this number alone; no global generator is involved.
    """
    generator = torch.Generator(source.device).manual_seed(seed)
    # bfloat16 is the upper half of a float32: adding random bits to the lower half carries over with just the right
    # odds.
    noise = torch.randint(0, 1 << 16, source.shape, generator=generator, dtype=torch.int32, device=source.device)
    bits = (source.contiguous().view(torch.int32) + noise) & -(1 << 16)
    target.copy_(bits.view(torch.float32))
