"""Sets the skip flag of a step and updates its counts in one Triton program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..costs import Cost, size
from ..table import upload
from .operators import addresses, launch, operator

__all__ = ["settle"]

CHUNK = 1024


@triton.jit(do_not_specialize=["count", "steps"])
def _kernel(
    table, magnitudes, others, found, count, steps, INTEGERS: tl.constexpr, SKIPPED: tl.constexpr, OTHERS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    offsets = tl.arange(0, CHUNK)
    worst = tl.zeros([CHUNK], tl.int32)
    for begin in range(0, count, CHUNK):
        mask = begin + offsets < count
        size = tl.load(magnitudes + begin + offsets, mask=mask, other=0.0)
        # The bound is LIMITS[float32] of spectrim.kernels.settling; NaN is not below it.
        bad = tl.where(size < 1e19, 0, 1)
        worst = tl.maximum(worst, bad)
        if SKIPPED:
            address = tl.load(table + steps + begin + offsets, mask=mask, other=0)
            if INTEGERS:
                at = address.to(tl.pointer_type(tl.int32))
                tl.store(at, tl.load(at, mask=mask, other=0) + bad, mask=mask)
            else:
                at = address.to(tl.pointer_type(tl.float32))
                tl.store(at, tl.load(at, mask=mask, other=0.0) + bad, mask=mask)
    skip = tl.max(worst, axis=0) > 0
    if OTHERS:
        skip = skip | (tl.load(others) != 0)
    tl.store(found, tl.where(skip, 1.0, 0.0))
    for begin in range(0, steps, CHUNK):
        mask = begin + offsets < steps
        at = tl.load(table + begin + offsets, mask=mask, other=0).to(tl.pointer_type(tl.float32))
        tl.store(at, tl.load(at, mask=mask, other=0.0) + tl.where(skip, 0.0, 1.0), mask=mask)


@operator(
    mutates=("steps", "skipped"),
    fake=lambda magnitudes, *rest: magnitudes.new_empty(()),
    cost=lambda magnitudes, steps, skipped, *rest: Cost(2, size([magnitudes]) + 2 * size(steps, skipped), {}),
)
def settle(magnitudes: Tensor, steps: list[Tensor], skipped: list[Tensor], found_inf: Tensor | None) -> Tensor:
    """:func:`~spectrim.kernels.settling.settle` as an operator."""
    device = magnitudes.device
    table = upload(device, [addresses(steps), addresses(skipped)])
    found = torch.empty((), dtype=torch.float32, device=device)
    launch(
        _kernel,
        1,
        device,
        table if table.numel() else magnitudes,
        magnitudes,
        magnitudes if found_inf is None else found_inf,
        found,
        len(magnitudes),
        len(steps),
        bool(skipped) and skipped[0].dtype == torch.int32,
        bool(skipped),
        found_inf is not None,
        CHUNK=CHUNK,
        num_warps=4,
    )
    return found
