"""Sums of stacks with a coefficient for each matrix, and sums of squares, in Triton: one launch for a list."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..costs import Cost, size
from ..table import BLOCK, block_map, upload
from .common import entries, pointer, put, work_of
from .operators import TYPES, aligned, launch, operator

__all__ = ["combine", "square_sums"]

#: Partial sums that a program adds at a time.
CHUNK = 256


@triton.jit
def _sum(x_at, y_at, out_at, offsets, left, a, b, SUM: tl.constexpr, MASKED: tl.constexpr):
    x = entries(x_at, offsets, left, MASKED)
    total = (x * a).to(tl.float32)
    if SUM:
        y = entries(y_at, offsets, left, MASKED)
        total = (x * a + y * b).to(tl.float32)
    put(out_at, offsets, left, total, total, False, MASKED)


@triton.jit(do_not_specialize=["count"])
def _combine_kernel(
    table, blocks, count, a, b,
    OUT: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, SUM: tl.constexpr, FACTOR: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    matrix, _matrix, begin, left = work_of(blocks, ALIGNED)
    out_at = pointer(table, matrix, begin, OUT, ALIGNED)
    x_at = pointer(table, count + matrix, begin, X, ALIGNED)
    y_at = pointer(table, 2 * count + matrix, begin, Y, ALIGNED)
    of_x = tl.load(a + matrix)
    of_y = of_x * 0 + 1
    if FACTOR:
        of_y = tl.load(b + matrix)
    offsets = tl.arange(0, BLOCK)
    if left >= BLOCK:
        _sum(x_at, y_at, out_at, offsets, 0, of_x, of_y, SUM, False)
    else:
        _sum(x_at, y_at, out_at, offsets, left, of_x, of_y, SUM, True)


@triton.jit(do_not_specialize=["count"])
def _squares_kernel(table, blocks, count, sums, X: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    matrix, _matrix, begin, left = work_of(blocks, ALIGNED)
    x_at = pointer(table, matrix, begin, X, ALIGNED)
    # In float64, which holds the square of every float32 number.
    x = entries(x_at, tl.arange(0, BLOCK), left, True).to(tl.float64)
    tl.store(sums + tl.program_id(0), tl.sum(x * x, axis=0))


@triton.jit
def _total_kernel(spans, sums, totals, CHUNK: tl.constexpr):
    """Add the partial sums of a matrix, always in the same order."""
    matrix = tl.program_id(0)
    start = tl.load(spans + 2 * matrix)
    blocks = tl.load(spans + 2 * matrix + 1)
    offsets = tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK], tl.float64)
    for begin in range(0, blocks, CHUNK):
        total += tl.load(sums + start + begin + offsets, mask=begin + offsets < blocks, other=0.0)
    tl.store(totals + matrix, tl.sum(total, axis=0))


def _combine_cost(out: Sequence[Tensor], x: Sequence[Tensor], a: Tensor, y: Any, b: Any) -> Cost:
    return Cost(1, size(out, x) + size(y or []), {})


@operator(
    "(Tensor(a!)[] out, Tensor[] x, Tensor a, Tensor[]? y, Tensor? b) -> ()", mutates=("out",), cost=_combine_cost
)
def combine(out: list[Tensor], x: list[Tensor], a: Tensor, y: list[Tensor] | None, b: Tensor | None) -> None:
    """:func:`~spectrim.kernels.stacks.combine` as an operator."""
    lists = [out, x] if y is None else [out, x, y]
    if any(stack.dtype != stacks[0].dtype for stacks in lists for stack in stacks):
        raise ValueError("stacks of one list have different dtypes: expected one")
    rows = [_matrix_addresses(stacks) for stacks in lists]
    map_ = block_map(_matrix_sizes(out), None, a.device)
    launch(
        _combine_kernel,
        map_.programs,
        a.device,
        upload(a.device, rows),
        map_.blocks,
        len(rows[0]),
        a,
        a if b is None else b,
        *(TYPES[stacks[0].dtype] for stacks in (out, x, x if y is None else y)),
        y is not None,
        b is not None,
        ALIGNED=map_.aligned and aligned(rows),
        BLOCK=BLOCK,
        num_warps=8,
    )


def _sums_fake(stacks: list[Tensor]) -> Tensor:
    return stacks[0].new_empty(sum(len(stack) for stack in stacks), dtype=torch.float64)


@operator("(Tensor[] stacks) -> Tensor", fake=_sums_fake, cost=lambda stacks: Cost(2, size(stacks), {}))
def square_sums(stacks: list[Tensor]) -> Tensor:
    """The sum of squares of every matrix, in float64; the same to the bit each time."""
    device = stacks[0].device
    if any(stack.dtype != stacks[0].dtype for stack in stacks):
        raise ValueError("stacks have different dtypes: expected one")
    rows = [_matrix_addresses(stacks)]
    map_ = block_map(_matrix_sizes(stacks), None, device)
    sums = torch.empty(map_.programs, dtype=torch.float64, device=device)
    totals = torch.empty(len(rows[0]), dtype=torch.float64, device=device)
    constants = {"ALIGNED": map_.aligned and aligned(rows), "BLOCK": BLOCK, "num_warps": 8}
    table = upload(device, rows)
    launch(
        _squares_kernel,
        map_.programs,
        device,
        table,
        map_.blocks,
        len(rows[0]),
        sums,
        TYPES[stacks[0].dtype],
        **constants,
    )
    launch(_total_kernel, len(rows[0]), device, map_.spans, sums, totals, CHUNK=CHUNK, num_warps=4)
    return totals


def _matrix_addresses(stacks: Sequence[Tensor]) -> list[int]:
    found: list[int] = []
    for stack in stacks:
        start, step = stack.data_ptr(), stack.stride(0) * stack.element_size()
        found += [start + step * index for index in range(len(stack))]
    return found


def _matrix_sizes(stacks: Sequence[Tensor]) -> list[int]:
    return [size for stack in stacks for size in [stack.shape[1] * stack.shape[2]] * len(stack)]
