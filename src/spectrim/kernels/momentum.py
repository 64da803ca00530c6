"""Momentum over lists, as a sum or an average, with or without Nesterov's step, and its sign."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .choice import kernel_runs
from .lists import Found, Number, clear_if_skipped, fused_serves, fused_sgd, held, like, listed, with_zeros, working
from .rounding import LOW, seed_of, write_rounded
from .runs import Run, check_per_matrix, flat
from .shrinking import ShrinkForm, shrunk

__all__ = ["momentum", "momentum_directions"]


def momentum(grad: Tensor, buffer: Tensor, *, decay: Number, average: bool, nesterov: bool) -> Tensor:
    """The momentum direction, as a formula; updates the buffer in place.

    A sum is M ← μM + G, and with Nesterov G + μM. An average is M ← βM + (1 − β)G, and with Nesterov G + β(M − G).

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
    taus: Tensor | None = None,
    runs: Sequence[Run] | None = None,
    form: ShrinkForm = "redescending",
    seeds: Sequence[int] | None = None,
    steps: Sequence[Tensor] | None = None,
) -> None:
    """Write the momentum direction of every gradient to ``out``, or its sign; updates the buffers in place.

    Args:
        grads, buffers: with the shapes of ``out``, which may be uninitialised. The arithmetic is in the dtype of
            ``out``, float32 or wider.
        taus, runs, form: as for :func:`~.shrinking.shrunk`, which is applied to the gradients first.
        seeds: one for each tensor, for stochastic rounding of buffers in bfloat16; without, they round to nearest.
        steps: scalar counts of steps, which change the random numbers from step to step.
    """
    if not out:
        return
    if taus is not None:
        check_per_matrix("taus", taus, grads, runs)
    if kernel_runs("momentum_directions", out, grads, buffers, scalars=steps or ()):
        from .device import momentum as device

        lists, options = map(list, (grads, buffers, out)), (decay, average, nesterov, sign)
        device.momentum_directions(*lists, *options, found, taus, flat(runs), form, listed(seeds), list(steps or ()))
        return
    grads = shrunk(grads, taus, runs, form, working(out[0]))
    # With zero momentum the fused kernel would not update buffers.
    if decay != 0 and fused_serves(out, grads, buffers):
        # Fused SGD with learning rate −1 on zeros gives the direction; its dampening makes the sum an average.
        targets = list(out)
        torch._foreach_zero_(targets)
        dampening, plain = (decay, False) if average else (0.0, nesterov)
        fused_sgd(targets, grads, buffers, lr=-1, momentum=decay, dampening=dampening, nesterov=plain, found=found)
        if nesterov and average:
            torch._foreach_lerp_(targets, list(grads), 1 - decay)
            clear_if_skipped(targets, found)
    else:
        beta = held(decay, found)
        for index, (grad, buffer, target) in enumerate(zip(with_zeros(grads, found), buffers, out, strict=True)):
            exact = buffer.to(working(target))
            target.copy_(momentum(grad.to(exact.dtype), exact, decay=beta, average=average, nesterov=nesterov))
            if exact is not buffer:
                step = None if steps is None else steps[index]
                write_rounded(buffer, exact, seed_of(seeds, index), step, LOW)
    if sign:
        torch._foreach_sign_(list(out))
