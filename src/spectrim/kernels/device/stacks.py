"""Linear combinations of stacks and sums of squares in Triton, by one launch per list."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..costs import Cost, size
from ..table import BLOCK, BlockMap, block_map, upload
from .common import entries, pointer, put, work_of
from .operators import TYPES, aligned, launch, operator

__all__ = ["clip_scales", "combine", "program_numbers", "square_sums"]

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
    # In float64, which cannot overflow here.
    x = entries(x_at, tl.arange(0, BLOCK), left, True).to(tl.float64)
    tl.store(sums + tl.program_id(0), tl.sum(x * x, axis=0))


@triton.jit
def _total(spans, sums, matrix, CHUNK: tl.constexpr):
    """Add the partial sums of a matrix in a fixed order."""
    start = tl.load(spans + 2 * matrix)
    blocks = tl.load(spans + 2 * matrix + 1)
    offsets = tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK], tl.float64)
    for begin in range(0, blocks, CHUNK):
        total += tl.load(sums + start + begin + offsets, mask=begin + offsets < blocks, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _total_kernel(spans, sums, totals, CHUNK: tl.constexpr):
    matrix = tl.program_id(0)
    tl.store(totals + matrix, _total(spans, sums, matrix, CHUNK))


@triton.jit
def _smaller(x, y):
    """min(x, y), or NaN if x or y is NaN."""
    return tl.where(x != x, x, tl.where(y < x, y, tl.where(y != y, y, x)))


@triton.jit
def _scales_kernel(
    spans, sums, threshold, unit, low, c, number, size, most, least, step,
    SMALLEST: tl.constexpr, TENSOR: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(0)
    total = _total(spans, sums, matrix, CHUNK)
    norm = tl.sqrt(total)
    norm = tl.where(norm < SMALLEST, norm * 0 + SMALLEST, norm)
    bound = norm * 0 + number
    if TENSOR:
        bound = norm * 0 + tl.load(threshold + matrix * step).to(tl.float64)
    bound = _smaller(bound, _smaller(norm * most, norm * 0 + 3e38))
    # Computed relative to max(norm, bound), so that no square overflows or underflows.
    larger = tl.where(norm > bound, norm, bound)
    ratio = tl.where(norm > bound, bound, norm) / larger
    factor = size / (larger * tl.sqrt(1 + ratio * ratio))
    lowest = bound * factor
    tl.store(unit + matrix, factor)
    tl.store(low + matrix, tl.where(lowest < size * least, size * least + lowest * 0, lowest).to(tl.float32))
    tl.store(c + matrix, bound.to(tl.float32))


@triton.jit(do_not_specialize=["matrices", "numbers", "rows", "count"])
def _numbers_kernel(
    spans, sums, low, table, powers, ends, out, matrices, numbers, rows, count, smallest,
    LOW: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(0)
    size = tl.sqrt(_total(spans, sums, matrix, CHUNK)).to(tl.float32)
    size = tl.where(size < smallest, smallest, size)
    offsets = tl.arange(0, CHUNK)
    row = 0
    if LOW:
        least = tl.load(low + matrix)
        value = size / (least * least * least * least)
        below = tl.load(ends + offsets, mask=offsets < count, other=float("inf")) < value
        row = tl.sum(below.to(tl.int32), axis=0)
    mask = offsets < numbers
    number = tl.load(table + offsets * rows + row, mask=mask, other=0.0)
    power = tl.load(powers + offsets, mask=mask, other=0.0)
    tl.store(out + offsets * matrices + matrix, number * tl.exp2(power * tl.log2(size)), mask=mask)


@operator(mutates=("out",), cost=lambda out, x, a, y, b: Cost(1, size(out, x, y), {}))
def combine(out: list[Tensor], x: list[Tensor], a: Tensor, y: list[Tensor], b: Tensor | None) -> None:
    """:func:`~spectrim.kernels.stacks.combine` as an operator."""
    lists = [out, x, y] if y else [out, x]
    if any(stack.dtype != stacks[0].dtype for stacks in lists for stack in stacks):
        raise ValueError("stacks of one list have different dtypes: expected one dtype")
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
        *(TYPES[stacks[0].dtype] for stacks in (out, x, y or x)),
        bool(y),
        b is not None,
        ALIGNED=map_.aligned and aligned(rows),
        BLOCK=BLOCK,
        num_warps=8,
    )


@operator(
    fake=lambda stacks: stacks[0].new_empty(sum(map(len, stacks)), dtype=torch.float64),
    cost=lambda stacks: Cost(2, size(stacks), {}),
)
def square_sums(stacks: list[Tensor]) -> Tensor:
    """The sum of squares of every matrix in float64; deterministic."""
    sums, map_, count = _partial_sums(stacks)
    totals = torch.empty(count, dtype=torch.float64, device=sums.device)
    launch(_total_kernel, count, sums.device, map_.spans, sums, totals, CHUNK=CHUNK, num_warps=4)
    return totals


def _partial_sums(stacks: Sequence[Tensor]) -> tuple[Tensor, BlockMap, int]:
    """The blocks' sums of squares, the block map, and the number of matrices."""
    device = stacks[0].device
    if any(stack.dtype != stacks[0].dtype for stack in stacks):
        raise ValueError("stacks have different dtypes: expected one dtype")
    rows = [_matrix_addresses(stacks)]
    map_ = block_map(_matrix_sizes(stacks), None, device)
    sums = torch.empty(map_.programs, dtype=torch.float64, device=device)
    launch(
        _squares_kernel,
        map_.programs,
        device,
        upload(device, rows),
        map_.blocks,
        len(rows[0]),
        sums,
        TYPES[stacks[0].dtype],
        ALIGNED=map_.aligned and aligned(rows),
        BLOCK=BLOCK,
        num_warps=8,
    )
    return sums, map_, len(rows[0])


def _scales_fake(stacks: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    count = sum(len(stack) for stack in stacks)
    unit = stacks[0].new_empty(count, dtype=torch.float64)
    return unit, unit.float(), unit.float()


@operator(
    fake=_scales_fake,
    cost=lambda stacks, *rest: Cost(2, size(stacks), {}),
)
def clip_scales(
    stacks: list[Tensor],
    threshold: Tensor | None,
    number: float,
    size: float,
    most: float,
    least: float,
    smallest: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`~spectrim.kernels.stacks.clip_scales` as an operator."""
    sums, map_, count = _partial_sums(stacks)
    unit = torch.empty(count, dtype=torch.float64, device=sums.device)
    low, c = (torch.empty(count, dtype=torch.float32, device=sums.device) for _ in range(2))
    # One threshold for all matrices, or one per matrix.
    step = 0 if threshold is None or threshold.ndim == 0 else 1
    launch(
        _scales_kernel,
        count,
        sums.device,
        map_.spans,
        sums,
        unit if threshold is None else threshold,
        unit,
        low,
        c,
        number,
        size,
        most,
        least,
        step,
        smallest,
        threshold is not None,
        CHUNK=CHUNK,
        num_warps=4,
    )
    return unit, low, c


@operator(
    fake=lambda stack, low, table, *rest: table.new_empty(table.shape[0], len(stack)),
    cost=lambda stack, *rest: Cost(2, size([stack]), {}),
)
def program_numbers(
    stack: Tensor, low: Tensor | None, table: Tensor, powers: Tensor, ends: Tensor | None, smallest: float
) -> Tensor:
    """:func:`~spectrim.kernels.stacks.program_numbers` as an operator."""
    sums, map_, count = _partial_sums([stack])
    out = torch.empty(table.shape[0], count, dtype=torch.float32, device=stack.device)
    launch(
        _numbers_kernel,
        count,
        stack.device,
        map_.spans,
        sums,
        out if low is None else low,
        table,
        powers,
        out if ends is None else ends,
        out,
        count,
        table.shape[0],
        table.shape[1],
        0 if ends is None else len(ends),
        smallest,
        low is not None,
        CHUNK=CHUNK,
        num_warps=4,
    )
    return out


def _matrix_addresses(stacks: Sequence[Tensor]) -> list[int]:
    starts = [(stack.data_ptr(), stack.stride(0) * stack.element_size(), len(stack)) for stack in stacks]
    return [start + step * index for start, step, count in starts for index in range(count)]


def _matrix_sizes(stacks: Sequence[Tensor]) -> list[int]:
    return [size for stack in stacks for size in [stack.shape[1] * stack.shape[2]] * len(stack)]
