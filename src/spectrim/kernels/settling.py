"""What becomes of a step whose gradients were screened: one flag, the step counts, and who was to blame."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .choice import kernel_runs

__all__ = ["settle"]


def settle(
    magnitudes: Tensor, steps: Sequence[Tensor], skipped: Sequence[Tensor], found_inf: Tensor | None = None
) -> Tensor:
    """Whether the step is skipped; counts it in ``steps`` where it is not, and in ``skipped`` of whoever was to blame.

    Args:
        magnitudes: (N,), of :func:`~.magnitudes.largest_magnitudes`.
        steps: scalars in float32, distinct, that grow by one unless the step is skipped; as many as there are
            gradients, or of any other number.
        skipped: N scalars of one dtype, float32 or int32, distinct; or none. Those of non-finite gradients grow by one.
        found_inf: None, or a number other than 0 where the step is to be skipped whatever the gradients hold, as
            ``torch.amp.GradScaler`` and other ranks have it: float32 of one entry.

    Returns:
        A float32 scalar: exactly 1 where the step is skipped, else 0.
    """
    if skipped and len(skipped) != len(magnitudes):
        raise ValueError(
            f"{len(skipped)} counts of skipped steps for {len(magnitudes)} gradients: expected one for each"
        )
    others = () if found_inf is None else (found_inf,)
    if magnitudes.dtype == torch.float32 and kernel_runs("settle", [magnitudes], scalars=(*steps, *others)):
        from .device import settle as device

        return device.settle(magnitudes, list(steps), list(skipped), found_inf)  # type: ignore[no-any-return]
    # Zero times what is not finite is no number.
    bad = (magnitudes * 0 != 0).float()
    found = bad.amax()
    if found_inf is not None:
        found = torch.maximum(found, (found_inf.reshape(()) != 0).float())
    if steps:
        # As a list: a single tensor in its place would be read by the host where the list is not uniform.
        torch._foreach_add_(list(steps), [(1 - found).to(steps[0].dtype)] * len(steps))
    if skipped:
        torch._foreach_add_(list(skipped), list(bad.to(skipped[0].dtype).unbind()))
    return found
