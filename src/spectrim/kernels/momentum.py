"""Momentum over lists, as a sum or an average, with or without Nesterov's look ahead, and its sign."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .adam import Number, like
from .lists import Found, fused_serves, held, with_zeros

__all__ = ["momentum", "momentum_directions"]


def momentum(grad: Tensor, buffer: Tensor, *, decay: Number, average: bool, nesterov: bool) -> Tensor:
    """The momentum direction, as a formula; updates the buffer in place.

    As a sum M ← μM + G, and with Nesterov G + μM; as an average M ← βM + (1 − β)G, and with Nesterov G + β(M − G).

    Returns:
        A new tensor with Nesterov, else the buffer itself.
    """
    if average:
        buffer.lerp_(grad, like(1 - decay, grad))
        return torch.lerp(grad, buffer, like(decay, grad)) if nesterov else buffer
    buffer.mul_(like(decay, buffer)).add_(grad)
    return grad + buffer * like(decay, buffer) if nesterov else buffer


def momentum_directions(
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    out: Sequence[Tensor],
    *,
    decay: float,
    average: bool = False,
    nesterov: bool = False,
    sign: bool = False,
    found: Found = None,
) -> None:
    """Write the momentum direction of every gradient to ``out``, or its sign; updates the buffers in place.

    Args:
        grads, buffers: of one shape and dtype each with its ``out``, which may hold anything.
    """
    if fused_serves(out, grads, buffers):
        # Fused SGD of learning rate −1 on zeros leaves the direction; its dampening makes the sum an average.
        targets = list(out)
        torch._foreach_zero_(targets)
        torch._fused_sgd_(
            targets,
            list(grads),
            list(buffers),
            weight_decay=0.0,
            momentum=decay,
            lr=-1.0,
            dampening=decay if average else 0.0,
            nesterov=nesterov and not average,
            maximize=False,
            is_first_step=False,
            found_inf=found,
        )
        if nesterov and average:
            torch._foreach_lerp_(targets, list(grads), 1 - decay)
    else:
        beta = held(decay, found)
        for grad, buffer, target in zip(with_zeros(grads, found), buffers, out, strict=True):
            target.copy_(momentum(grad, buffer, decay=beta, average=average, nesterov=nesterov))
    if sign:
        torch._foreach_sign_(list(out))
