"""Adam over lists: the direction alone, and AdamW's whole step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .choice import kernel_runs
from .lists import (
    Found,
    Number,
    clear_if_skipped,
    fused_serves,
    held,
    like,
    listed,
    of_equal_numbers,
    rates,
    spread,
    with_zeros,
    working,
)
from .rounding import HIGH, LOW, SECOND, seed_of, write_rounded
from .runs import Run, check_per_matrix, flat
from .shrinking import ShrinkForm, shrunk

__all__ = ["adam", "adam_directions", "adamw_step", "bias_correction", "stepped_by"]

StepForm = Literal["torch", "kernel", "formula"]


def adam(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, *, beta1: Number, beta2: Number, eps: float
) -> Tensor:
    """The bias-corrected Adam direction m̂ / (√v̂ + ε), as a formula; updates both moments in place.

    Args:
        grad, exp_avg, exp_avg_sq: of one shape and dtype.
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
    taus: Tensor | None = None,
    runs: Sequence[Run] | None = None,
    form: ShrinkForm = "redescending",
    seeds: Sequence[int] | None = None,
) -> None:
    """Write the Adam direction of every gradient to ``out``, finite if the step is skipped; updates the moments.

    Args:
        grads, exp_avgs, exp_avg_sqs: with the shapes of ``out``, which may be uninitialised. The arithmetic is in the
            dtype of ``out``, float32 or wider.
        steps: scalar counts of steps, including this one.
        taus, runs, form: as for :func:`~.shrinking.shrunk`, which is applied to the gradients first.
        seeds: one for each tensor, for stochastic rounding of moments in bfloat16; without, they round to nearest.
    """
    if not out:
        return
    if taus is not None:
        check_per_matrix("taus", taus, grads, runs)
    if kernel_runs("adam_directions", out, grads, exp_avgs, exp_avg_sqs, scalars=steps):
        from .device import adam as device

        lists = map(list, (grads, exp_avgs, exp_avg_sqs, steps, out))
        device.adam_directions(*lists, beta1, beta2, eps, found, taus, flat(runs), form, listed(seeds))
        return
    grads = shrunk(grads, taus, runs, form, working(out[0]))
    if fused_serves(out, grads, exp_avgs, exp_avg_sqs):
        # A fused AdamW step with learning rate −1 on zeros, without decay, gives exactly the direction.
        torch._foreach_zero_(list(out))
        _fused((out, grads, exp_avgs, exp_avg_sqs, steps), -1.0, beta1, beta2, eps, 0.0, found)
        return
    for index, (grad, target) in enumerate(zip(with_zeros(grads, found), out, strict=True)):
        state, seed = (exp_avgs[index], exp_avg_sqs[index], steps[index]), seed_of(seeds, index)
        target.copy_(_direction(grad, *state, working(target), beta1, beta2, eps, found, seed))
    clear_if_skipped(out, found)


def stepped_by(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    shrinks: bool = False,
) -> StepForm:
    """The form of AdamW's step: torch's fused kernel, the Triton kernel, or the formula by single operations."""
    fused = fused_serves(params, grads, exp_avgs, exp_avg_sqs)
    # Torch's own kernel takes one pass too if nothing is shrunk.
    if fused and not shrinks:
        return "torch"
    if kernel_runs("adamw_step", params, grads, exp_avgs, exp_avg_sqs, scalars=steps):
        return "kernel"
    return "torch" if fused else "formula"


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: Number | Sequence[Number],
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float | Sequence[float],
    found: Found = None,
    taus: Tensor | None = None,
    runs: Sequence[Run] | None = None,
    form: ShrinkForm = "redescending",
    seeds: Sequence[int] | None = None,
    by: StepForm | None = None,
) -> None:
    """AdamW's step of every parameter; with ``taus``, gradients are shrunk first.

    The eager form uses torch's fused kernel if possible (:func:`~.lists.fused_serves`). The arithmetic of bfloat16
    weights with float32 moments is in float32.

    Args:
        lr, weight_decay: one for all, or one for each parameter.
        taus, runs, form: as for :func:`~.shrinking.shrunk`.
        seeds: one for each tensor, for stochastic rounding of weights in bfloat16; without, they round to nearest.
        by: the result of :func:`stepped_by`, if known.
    """
    if not params:
        return
    if taus is not None:
        check_per_matrix("taus", taus, grads, runs)
    lrs, decays = spread(lr, len(params)), spread(weight_decay, len(params))
    by = by or stepped_by(params, grads, exp_avgs, exp_avg_sqs, steps, shrinks=taus is not None)
    if by == "kernel":
        from .device import adam as device

        lists = map(list, (params, grads, exp_avgs, exp_avg_sqs, steps))
        numbers = (*rates(lrs), decays, beta1, beta2, eps)
        device.adamw_step(*lists, *numbers, found, taus, flat(runs), form, listed(seeds))
        return
    grads = shrunk(grads, taus, runs, form, working(exp_avgs[0]))
    if by == "torch":
        for rate, decay, chosen in of_equal_numbers(lrs, decays):
            some = [[tensors[i] for i in chosen] for tensors in (params, grads, exp_avgs, exp_avg_sqs, steps)]
            _fused(some, rate, beta1, beta2, eps, decay, found)
        return
    for index, (param, grad) in enumerate(zip(params, with_zeros(grads, found), strict=True)):
        state, seed = (exp_avgs[index], exp_avg_sqs[index], steps[index]), seed_of(seeds, index)
        direction = _direction(grad, *state, working(param), beta1, beta2, eps, found, seed)
        rate, exact = like(lrs[index], direction), param.to(direction.dtype)
        changed = exact * (1 - rate * decays[index]) - direction * rate
        changed = changed if found is None else torch.where(found > 0, exact, changed)
        write_rounded(param, changed, seed, steps[index], SECOND)


def _direction(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    dtype: torch.dtype,
    beta1: float,
    beta2: float,
    eps: float,
    found: Found,
    seed: int | None,
) -> Tensor:
    """:func:`adam` in a given dtype, for a gradient and moments of any dtypes; a skipped step keeps the moments."""
    # If the first step is skipped, the count is 0 and has no bias correction.
    count = step if found is None else step.clamp_min(1)
    moments = (exp_avg.to(dtype), exp_avg_sq.to(dtype))
    direction = adam(grad.to(dtype), *moments, count, beta1=held(beta1, found), beta2=held(beta2, found), eps=eps)
    for stored, exact, lane in zip((exp_avg, exp_avg_sq), moments, (LOW, HIGH), strict=True):
        if exact is not stored:
            write_rounded(stored, exact, seed, step, lane)
    return direction


def _fused(
    lists: Sequence[Sequence[Tensor]],
    lr: Number,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    found: Found,
) -> None:
    """AdamW's step by torch's fused kernel. ``lists``: parameters, gradients, both moments and steps."""
    params, grads, exp_avgs, exp_avg_sqs, steps = map(list, lists)
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
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
    """1 − βᵗ as a float64 scalar; in float32, β = 0.999 and a small t would lose the leading digits."""
    base = torch.as_tensor(decay, dtype=torch.float64, device=step.device) if isinstance(decay, Tensor) else decay
    return 1 - torch.pow(base, step.double())
