"""The update over lists: X ← (1 − ηλ)X − η s U."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .choice import kernel_runs
from .lists import Found, Number, fused_serves, fused_sgd, like, listed, of_equal_numbers, rates, spread, working
from .rounding import SECOND, seed_of, write_rounded
from .runs import Run, check_per_matrix, flat, parts

__all__ = ["apply_updates"]


def apply_updates(
    weights: Sequence[Tensor],
    updates: Sequence[Tensor],
    *,
    lr: Number | Sequence[Number],
    weight_decay: float | Sequence[float] = 0.0,
    scale: float | Tensor = 1.0,
    runs: Sequence[Run] | None = None,
    found: Found = None,
    seeds: Sequence[int] | None = None,
    steps: Sequence[Tensor] | None = None,
) -> None:
    """X ← (1 − lr · weight_decay) X − lr · scale · U for every weight X and its update U, in place.

    Args:
        weights: of any floating-point dtypes. Those narrower than float32 are computed in float32 and rounded once.
        updates: with the weights' shapes, of any floating-point dtypes; not written to.
        lr: a number, or a scalar tensor on the weights' device; one for all or one for each weight.
        weight_decay: one for all, or one for each weight.
        scale: a positive number; or a float32 vector on the device, one number for each run, or weight without runs.
        runs: must cover every weight, if ``scale`` is a vector.
        seeds: one for each weight, for stochastic rounding of bfloat16; without, they round to nearest.
        steps: scalar counts of steps, which change the random numbers from step to step.
    """
    if not weights:
        return
    if isinstance(scale, Tensor):
        check_per_matrix("scale", scale, weights, runs)
    lrs, decays = spread(lr, len(weights)), spread(weight_decay, len(weights))
    plain = not isinstance(scale, Tensor) and fused_serves(weights, updates)
    # Torch's own kernel takes one pass too if one number scales all.
    if not plain and kernel_runs("apply_updates", weights, updates, scalars=steps or ()):
        from .device import update as device

        scales = (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
        options = (*scales, flat(runs), found, listed(seeds), list(steps or ()))
        device.apply_updates(list(weights), list(updates), *rates(lrs), decays, *options)
        return
    if not isinstance(scale, Tensor) and fused_serves(weights, updates):
        for rate, decay, chosen in of_equal_numbers(lrs, decays):
            # Fused SGD without momentum gives this, if its coupled decay is divided by the scale.
            some, changes = [weights[i] for i in chosen], [updates[i] for i in chosen]
            fused_sgd(some, changes, [], lr=rate * scale, weight_decay=decay / scale, found=found)
        return
    for index, (weight, scaled) in enumerate(zip(weights, _scaled(updates, weights, scale, runs), strict=True)):
        exact, rate = weight.to(scaled.dtype), like(lrs[index], scaled)
        changed = exact * (1 - rate * decays[index]) - scaled * rate
        step = None if steps is None else steps[index]
        changed = changed if found is None else torch.where(found > 0, exact, changed)
        write_rounded(weight, changed, seed_of(seeds, index), step, SECOND)


def _scaled(
    updates: Sequence[Tensor], weights: Sequence[Tensor], scale: float | Tensor, runs: Sequence[Run] | None
) -> list[Tensor]:
    """New tensors: updates times their scales, in the precision of the arithmetic."""
    dtypes = [torch.promote_types(working(w), working(u)) for w, u in zip(weights, updates, strict=True)]
    if not isinstance(scale, Tensor):
        return [update.to(dtype) * scale for update, dtype in zip(updates, dtypes, strict=True)]
    if runs is None:
        factors = scale.unbind()
        return [u.to(dtype) * f.to(dtype) for u, dtype, f in zip(updates, dtypes, factors, strict=True)]
    result = [torch.empty_like(update, dtype=dtype) for update, dtype in zip(updates, dtypes, strict=True)]
    for source, target, factor in zip(parts(updates, runs), parts(result, runs), scale.unbind(), strict=True):
        torch.mul(source.to(target.dtype), factor.to(target.dtype), out=target)
    return result
