"""Computes the skip flag of a step, and updates the counts of steps and skips."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .choice import kernel_runs

__all__ = ["LIMITS", "settle"]

#: Magnitudes from here on count as not finite, by the dtype of the moments. Smaller ones have squares whose sum over
#: steps is finite; an entry whose second moment is infinite would never move again.
LIMITS = {torch.float32: 1e19, torch.float64: 1e150}


def settle(
    magnitudes: Tensor,
    steps: Sequence[Tensor],
    skipped: Sequence[Tensor],
    found_inf: Tensor | None = None,
    *,
    limit: float = LIMITS[torch.float32],
) -> Tensor:
    """Compute the skip flag. Adds one to ``steps`` if the step is taken, and to ``skipped`` of non-finite gradients.

    Args:
        magnitudes: (N,), from :func:`~.magnitudes.largest_magnitudes`.
        steps: distinct float32 scalars, of any number.
        skipped: N distinct scalars of one dtype, float32 or int32; or none.
        found_inf: None, or a float32 tensor of one entry that is not 0 if the step must be skipped anyway, as from
            ``torch.amp.GradScaler`` or other ranks.
        limit: magnitudes from here on count as not finite.

    Returns:
        A float32 scalar: 1 if the step is skipped, else 0.
    """
    if skipped and len(skipped) != len(magnitudes):
        raise ValueError(
            f"{len(skipped)} counts of skipped steps for {len(magnitudes)} gradients: expected one for each"
        )
    others = () if found_inf is None else (found_inf,)
    narrow = magnitudes.dtype == torch.float32 and limit == LIMITS[torch.float32]
    if narrow and kernel_runs("settle", [magnitudes], scalars=(*steps, *others)):
        from .device import settle as device

        return device.settle(magnitudes, list(steps), list(skipped), found_inf)  # type: ignore[no-any-return]
    bad = (~torch.lt(magnitudes, limit)).float()
    found = bad.amax()
    if found_inf is not None:
        found = torch.maximum(found, (found_inf.reshape(()) != 0).float())
    if steps:
        # A list of tensors: torch would read a single scalar tensor from the device.
        torch._foreach_add_(list(steps), [1 - found] * len(steps))
    if skipped:
        torch._foreach_add_(list(skipped), list(bad.to(skipped[0].dtype).unbind()))
    return found
