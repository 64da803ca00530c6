"""AdEMAMix over lists: Adam with a second, slow average (arXiv 2409.03137)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .adam import bias_correction
from .choice import kernel_runs
from .lists import Found, Number, clear_if_skipped, held, like, listed, with_zeros, working
from .rounding import HIGH, LOW, SECOND, seed_of, write_rounded
from .runs import Run, check_per_matrix, flat
from .shrinking import ShrinkForm, shrunk

__all__ = ["ademamix", "ademamix_directions", "interpolated_decay"]


def ademamix(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_slow: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    betas: tuple[Number, Number, Number],
    alpha: float,
    eps: float,
    warmup_steps: int | None,
    taken: Tensor | None = None,
) -> Tensor:
    """The AdEMAMix direction (m̂₁ + a_t m₂) / (√v̂ + ε), as a formula; updates the three moments in place.

    Over ``warmup_steps``, a_t grows linearly to ``alpha``, and the half-life of the slow average grows linearly from
    that of β₁ to that of β₃.

    Args:
        taken: None, or a flag that is False if the slow average must not change.
    """
    beta1, beta2, beta3 = betas
    progress = torch.ones_like(step) if warmup_steps is None else (step / warmup_steps).clamp(max=1)
    slow = interpolated_decay(beta1, beta3, progress.double())
    if taken is not None:
        slow = torch.where(taken, slow, 1.0)
    exp_avg.lerp_(grad, like(1 - beta1, grad))
    exp_avg_slow.lerp_(grad, (1 - slow).to(grad.dtype))
    exp_avg_sq.mul_(beta2).add_(grad * grad * (1 - beta2))
    direction = exp_avg / bias_correction(beta1, step).to(grad.dtype)
    direction.addcmul_(exp_avg_slow, (alpha * progress).to(grad.dtype))
    return direction.div_(exp_avg_sq.sqrt().div_(bias_correction(beta2, step).sqrt().to(grad.dtype)).add_(eps))


def ademamix_directions(
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avgs_slow: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    out: Sequence[Tensor],
    *,
    betas: tuple[float, float, float],
    alpha: float,
    eps: float,
    warmup_steps: int | None,
    found: Found = None,
    taus: Tensor | None = None,
    runs: Sequence[Run] | None = None,
    form: ShrinkForm = "redescending",
    seeds: Sequence[int] | None = None,
) -> None:
    """Write the AdEMAMix direction of every gradient to ``out``; updates the three moments in place.

    Args:
        grads, exp_avgs, exp_avgs_slow, exp_avg_sqs, steps, out, taus, runs, form, seeds: as for
            :func:`~.adam.adam_directions`.
    """
    if not out:
        return
    if taus is not None:
        check_per_matrix("taus", taus, grads, runs)
    if kernel_runs("ademamix_directions", out, grads, exp_avgs, exp_avgs_slow, exp_avg_sqs, scalars=steps):
        from .device import ademamix as device

        lists = map(list, (grads, exp_avgs, exp_avgs_slow, exp_avg_sqs, steps, out))
        numbers = (list(betas), alpha, eps, warmup_steps)
        device.ademamix_directions(*lists, *numbers, found, taus, flat(runs), form, listed(seeds))
        return
    grads = shrunk(grads, taus, runs, form, working(out[0]))
    decays = (held(betas[0], found), held(betas[1], found), held(betas[2], found))
    taken = None if found is None else found == 0
    formula = partial(ademamix, betas=decays, alpha=alpha, eps=eps, warmup_steps=warmup_steps, taken=taken)
    stored_lists = zip(exp_avgs, exp_avgs_slow, exp_avg_sqs, strict=True)
    entries = zip(with_zeros(grads, found), stored_lists, steps, out, strict=True)
    for index, (grad, stored, step, target) in enumerate(entries):
        dtype = working(target)
        count = step if found is None else step.clamp_min(1)
        first, slow, second = moments = [moment.to(dtype) for moment in stored]
        target.copy_(formula(grad.to(dtype), first, slow, second, count))
        for old, new, lane in zip(stored, moments, (LOW, SECOND, HIGH), strict=True):
            if new is not old:
                write_rounded(old, new, seed_of(seeds, index), step, lane)
    clear_if_skipped(out, found)


def interpolated_decay(start: Number, end: Number, progress: Tensor) -> Tensor:
    """The decay whose half-life is interpolated between those of two decays: ½^{1/(1 + (1−x) h(start) + x h(end))}.

    h(β) = ln ½ / ln β − 1, in steps; x in [0, 1] is a float64 scalar. The half-life of a decay of 1 is infinite.
    """

    def half_life(decay: Number) -> Number:
        if isinstance(decay, Tensor):
            return math.log(0.5) / decay.log() - 1
        return math.log(0.5) / math.log(decay) - 1 if 0 < decay < 1 else -1.0 if decay == 0 else math.inf

    # Zero times an infinite half-life would be NaN.
    early = torch.where(progress < 1, (1 - progress) * half_life(start), 0.0)
    late = torch.where(progress > 0, progress * half_life(end), 0.0)
    return torch.pow(0.5, 1 / (1 + early + late).abs())
