"""Adam over lists: the direction alone, and AdamW's whole step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .lists import Found, fused_serves, held, with_zeros

__all__ = ["adam", "adam_directions", "adamw_step", "bias_correction"]

Number = float | Tensor


def adam(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, *, beta1: Number, beta2: Number, eps: float
) -> Tensor:
    """The bias-corrected Adam direction m̂ / (√v̂ + ε), as a formula; updates both moments in place.

    Args:
        grad, exp_avg, exp_avg_sq: any one shape and dtype.
        step: scalar, 1 at the first step.
    """
    exp_avg.lerp_(grad, like(1 - beta1, grad))
    exp_avg_sq.mul_(beta2).add_(grad * grad * (1 - beta2))
    first = bias_correction(beta1, step).to(grad.dtype)
    second = bias_correction(beta2, step).sqrt().to(grad.dtype)
    return (exp_avg / first).div_(exp_avg_sq.sqrt().div_(second).add_(eps))


def adam_directions(
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    out: Sequence[Tensor],
    *,
    beta1: float,
    beta2: float,
    eps: float,
    found: Found = None,
) -> None:
    """Write the Adam direction of every gradient to ``out``; updates the moments in place.

    Args:
        grads, exp_avgs, exp_avg_sqs: of one shape and dtype each with its ``out``, which may hold anything.
        steps: scalars that count this step already.
    """
    if fused_serves(out, grads, exp_avgs, exp_avg_sqs):
        # A fused AdamW step of learning rate −1 on zeros, without decay, leaves exactly the direction.
        torch._foreach_zero_(list(out))
        _fused(out, grads, exp_avgs, exp_avg_sqs, steps, -1.0, beta1, beta2, eps, 0.0, found)
        return
    b1, b2 = held(beta1, found), held(beta2, found)
    lists = zip(with_zeros(grads, found), exp_avgs, exp_avg_sqs, steps, out, strict=True)
    for grad, exp_avg, exp_avg_sq, step, target in lists:
        # A first step that is skipped has counted nothing, and nothing to correct.
        count = step if found is None else step.clamp_min(1)
        target.copy_(adam(grad, exp_avg, exp_avg_sq, count, beta1=b1, beta2=b2, eps=eps))


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: Number,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    found: Found = None,
) -> None:
    """AdamW's step of every parameter by torch's fused kernel; :func:`~.lists.fused_serves` says which it takes."""
    _fused(params, grads, exp_avgs, exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, found)


def _fused(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Number,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    found: Found,
) -> None:
    torch._fused_adamw_(
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        [],
        list(steps),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        found_inf=found,
    )


def bias_correction(decay: Number, step: Tensor) -> Tensor:
    """1 − βᵗ as a float64 scalar: in float32 it loses its leading digits where β = 0.999 and t is small."""
    base = torch.as_tensor(decay, dtype=torch.float64, device=step.device) if isinstance(decay, Tensor) else decay
    return 1 - torch.pow(base, step.double())


def like(number: Number, tensor: Tensor) -> Number:
    """A number in a tensor's dtype, where it is a tensor."""
    return number.to(tensor.dtype) if isinstance(number, Tensor) else number
