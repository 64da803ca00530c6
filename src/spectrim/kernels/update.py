"""The update over lists: X ← (1 − ηλ)X − η s U."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .adam import Number, like
from .lists import Found, fused_serves

__all__ = ["apply_updates"]


def apply_updates(
    weights: Sequence[Tensor],
    updates: Sequence[Tensor],
    *,
    lr: Number,
    weight_decay: float = 0.0,
    scale: float = 1.0,
    found: Found = None,
) -> None:
    """X ← (1 − lr · weight_decay) X − lr · scale · U for every weight X and its update U, in place.

    Args:
        weights: of any floating-point dtypes; below float32 the arithmetic is done in float32 and rounded once.
        updates: each of its weight's shape, float32 or better. They are not written to.
        lr: a number, or a scalar tensor on the weights' device.
        scale: a positive number.
    """
    if fused_serves(weights, updates):
        # Fused SGD without momentum, its coupled decay divided by what multiplies the update, is just that in one pass.
        torch._fused_sgd_(
            list(weights),
            list(updates),
            [],
            weight_decay=weight_decay / scale,
            momentum=0.0,
            lr=lr * scale,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            found_inf=found,
        )
        return
    for weight, update in zip(weights, updates, strict=True):
        exact = weight.to(update.dtype)
        rate = like(lr, update)
        changed = exact * (1 - rate * weight_decay) - update * (rate * scale)
        weight.copy_(changed if found is None else torch.where(found > 0, exact, changed))
