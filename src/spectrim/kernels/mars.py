"""MARS's corrected gradients over lists (arXiv 2411.10438). Eager code alone: four calls for a whole list."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .lists import Found

__all__ = ["corrected_gradients"]


def corrected_gradients(
    grads: Sequence[Tensor], previous: Sequence[Tensor], out: Sequence[Tensor], *, share: float, found: Found = None
) -> None:
    """Write g + share · (g − g₋) to ``out`` for every gradient g and the one before it, g₋; then g₋ ← g.

    Args:
        grads: in the dtype of ``out``; not written to.
        previous: g₋, with the shapes of the gradients.
        out: with the shapes of the gradients, may be uninitialised; not finite if the step is skipped by a NaN.
        found: None, or a flag that is 1 if the step is skipped, so that ``previous`` must stay.
    """
    if not out:
        return
    targets, new = list(out), list(grads)
    torch._foreach_copy_(targets, new)
    torch._foreach_sub_(targets, list(previous))
    torch._foreach_mul_(targets, share)
    torch._foreach_add_(targets, new)
    if found is not None:
        skip = found > 0
        new = [torch.where(skip, old, grad.to(old.dtype)) for old, grad in zip(previous, new, strict=True)]
    torch._foreach_copy_(list(previous), new)
