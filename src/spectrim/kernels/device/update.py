"""The update over lists in Triton."""

import triton
import triton.language as tl
from torch import Tensor

from ..costs import entrywise_cost
from ..table import upload
from .common import entries, noise, number, number_or_tensor, pointer, put, work_of
from .operators import addresses, addresses_at, launches_of, operator

__all__ = ["apply_updates"]


@triton.jit(do_not_specialize=["count"])
def _kernel(
    table, blocks, count, found, scales, scale,
    WEIGHT: tl.constexpr, UPDATE: tl.constexpr, SCALES: tl.constexpr, STEPS: tl.constexpr,
    CHANCE: tl.constexpr, FOUND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, matrix, begin, left = work_of(blocks, ALIGNED)
    x_at = pointer(table, tensor, begin, WEIGHT, ALIGNED)
    u_at = pointer(table, count + tensor, begin, UPDATE, ALIGNED)
    offsets = tl.arange(0, BLOCK)
    skip = False
    if FOUND:
        skip = tl.load(found) != 0
    if not skip:
        lr = number_or_tensor(table, 5 * count + tensor, 3 * count + tensor)
        keep = 1 - lr * number(table, 6 * count + tensor)
        if SCALES:
            scale = tl.load(scales + matrix)
        rate = lr * scale
        random = offsets.to(tl.uint32)
        if CHANCE:
            step = 0.0
            if STEPS:
                step = tl.load(tl.load(table + 4 * count + tensor).to(tl.pointer_type(tl.float32)))
            random = noise(tl.load(table + 2 * count + tensor), step, begin, offsets, 1)
        if left >= BLOCK:
            x = entries(x_at, offsets, 0, False) * keep - rate * entries(u_at, offsets, 0, False)
            put(x_at, offsets, 0, x, random, CHANCE, False)
        else:
            x = entries(x_at, offsets, left, True) * keep - rate * entries(u_at, offsets, left, True)
            put(x_at, offsets, left, x, random, CHANCE, True)


@operator(
    mutates=("weights",),
    cost=lambda x, u, *rest: entrywise_cost([x, u], [x]),
)
def apply_updates(
    weights: list[Tensor],
    updates: list[Tensor],
    lrs: list[float],
    lr_tensors: list[Tensor],
    lr_places: list[int],
    weight_decays: list[float],
    scale: float,
    scales: Tensor | None,
    runs: list[int] | None,
    found: Tensor | None,
    seeds: list[int] | None,
    steps: list[Tensor],
) -> None:
    """:func:`~spectrim.kernels.update.apply_updates` as an operator."""
    counts = addresses(steps) or None
    rates = addresses_at(lr_tensors, lr_places)
    for part in launches_of(runs, weights, updates):
        rows = [*part.rows, part.of(seeds, 0), part.of(rates, 0), part.of(counts, 0)]
        part.launch(
            _kernel,
            upload(weights[0].device, rows, [part.of(lrs, 0.0), part.of(weight_decays, 0.0)]),
            found,
            scales,
            scale,
            *part.types,
            scales is not None,
            bool(steps),
            seeds is not None,
            found is not None,
        )
