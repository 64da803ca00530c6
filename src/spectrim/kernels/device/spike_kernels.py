"""Kernels of a step of Spectra that read matrices: momentum, products with the spikes' bases, and the update.

A program works on some rows, or columns, of one matrix, which is the grid's second dimension and has a row in the
table. Thin matrices, of k columns, are padded with zeros to the next power of two, and those of all matrices of a call
are consecutive. Sums are taken in a fixed order, so that replicas get the same bits.
"""

import triton
import triton.language as tl

from .common import mean_of, narrowed
from .thin_kernels import (
    BASIS,
    BUFFER,
    COLUMN,
    FIELDS,
    GRAD,
    NUMBERS,
    PART,
    RANK,
    RATE,
    ROW,
    ROWS_OF,
    STRIDE,
    WEIGHT,
    columns_of,
    field,
    place,
    skipped,
)


@triton.jit
def product_kernel(
    table, found, scratch, y, energies, decay, rest,
    TYPE: tl.constexpr, MOMENTUM: tl.constexpr, FROM_SCRATCH: tl.constexpr, FOUND: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Y = M V. With MOMENTUM 1 (sum) or 2 (average), M is updated first, and ‖M‖² of these rows is stored."""
    row = table + tl.program_id(1).to(tl.int64) * FIELDS
    begin = tl.program_id(0) * ROWS
    m = field(row, ROWS_OF)
    if begin >= m or skipped(found, FOUND):
        return
    n, k = columns_of(row, ALIGNED), field(row, RANK)
    inside = begin + tl.arange(0, ROWS) < m
    columns, directions = tl.arange(0, COLUMNS), tl.arange(0, K)
    offsets = tl.arange(0, ROWS)[:, None] * n + columns[None, :]
    m_at = place(row, BUFFER, tl.float32, ALIGNED) + begin.to(tl.int64) * n
    g_at = place(row, GRAD, TYPE, ALIGNED) + begin.to(tl.int64) * n
    if FROM_SCRATCH:
        v_at, stride = scratch + tl.load(row + COLUMN) * K, K
    else:
        v_at, stride = place(row, BASIS, tl.float32, False), field(row, STRIDE)
    basis = columns[:, None] * stride + directions[None, :]
    product = tl.zeros([ROWS, K], tl.float32)
    energy = tl.zeros([ROWS, COLUMNS // 4], tl.float64)
    for start in range(0, n, COLUMNS):
        within = columns < n - start
        mask = inside[:, None] & within[None, :]
        x = tl.load(m_at + offsets, mask=mask, other=0.0)
        if MOMENTUM > 0:
            g = tl.load(g_at + offsets, mask=mask, other=0.0).to(tl.float32)
            x = decay * x + g if MOMENTUM == 1 else mean_of(x, g, rest)
            tl.store(m_at + offsets, x, mask=mask)
            # In float64, which cannot overflow here.
            wide = x.to(tl.float64)
            energy += tl.sum(tl.reshape(wide * wide, [ROWS, COLUMNS // 4, 4]), axis=2)
        v = tl.load(v_at + basis, mask=within[:, None] & (directions < k)[None, :], other=0.0)
        product = tl.dot(x, v, product, input_precision=PRECISION)
        m_at += COLUMNS
        g_at += COLUMNS
        v_at += COLUMNS * stride
    at = y + (tl.load(row + ROW) + begin) * K + tl.arange(0, ROWS)[:, None] * K + directions[None, :]
    tl.store(at, product, mask=inside[:, None])
    if MOMENTUM > 0:
        index = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        tl.store(energies + index, tl.sum(energy))


@triton.jit
def transposed_kernel(
    table, found, u, parts, SPLIT: tl.constexpr, FOUND: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A part of the sum W = MᵀU, for some columns and rows of M."""
    row = table + tl.program_id(1).to(tl.int64) * FIELDS
    m, n = field(row, ROWS_OF), columns_of(row, ALIGNED)
    blocks = tl.cdiv(n, COLUMNS)
    split = tl.program_id(0) // blocks
    start = (tl.program_id(0) - split * blocks) * COLUMNS
    first = split * SPLIT
    if first >= m or skipped(found, FOUND):
        return
    last = tl.minimum(m, first + SPLIT)
    rows, directions = tl.arange(0, ROWS), tl.arange(0, K)
    within = start + tl.arange(0, COLUMNS) < n
    offsets = rows[:, None] * n + tl.arange(0, COLUMNS)[None, :]
    m_at = place(row, BUFFER, tl.float32, ALIGNED) + first.to(tl.int64) * n + start
    u_at = u + (tl.load(row + ROW) + first) * K
    # Computed as UᵀM, whose second factor needs no transposition in shared memory.
    product = tl.zeros([K, COLUMNS], tl.float32)
    for begin in range(first, last, ROWS):
        inside = rows < last - begin
        x = tl.load(m_at + offsets, mask=inside[:, None] & within[None, :], other=0.0)
        left = tl.load(u_at + rows[:, None] * K + directions[None, :], mask=inside[:, None], other=0.0)
        product = tl.dot(tl.trans(left), x, product, input_precision=PRECISION)
        m_at += ROWS * n
        u_at += ROWS * K
    at = parts + (tl.load(row + PART) + split.to(tl.int64) * n + start) * K
    at = at + tl.arange(0, COLUMNS)[:, None] * K + directions[None, :]
    tl.store(at, tl.trans(product), mask=within[:, None])


@triton.jit
def tail_kernel(
    table, found, u, w, tails, energies, FOUND: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """‖M − U Wᵀ‖² of some rows, for matrices whose ``tails`` is −1."""
    row = table + tl.program_id(1).to(tl.int64) * FIELDS
    begin = tl.program_id(0) * ROWS
    m = field(row, ROWS_OF)
    if begin >= m or tl.load(tails + tl.program_id(1)) >= 0 or skipped(found, FOUND):
        return
    n = columns_of(row, ALIGNED)
    inside = begin + tl.arange(0, ROWS) < m
    columns, directions = tl.arange(0, COLUMNS), tl.arange(0, K)
    offsets = tl.arange(0, ROWS)[:, None] * n + columns[None, :]
    m_at = place(row, BUFFER, tl.float32, ALIGNED) + begin.to(tl.int64) * n
    w_at = w + tl.load(row + PART) * K
    left_at = u + (tl.load(row + ROW) + begin) * K + tl.arange(0, ROWS)[:, None] * K + directions[None, :]
    left = tl.load(left_at, mask=inside[:, None], other=0.0)
    energy = tl.zeros([ROWS, COLUMNS // 4], tl.float64)
    for start in range(0, n, COLUMNS):
        within = columns < n - start
        x = tl.load(m_at + offsets, mask=inside[:, None] & within[None, :], other=0.0)
        right = tl.load(w_at + columns[:, None] * K + directions[None, :], mask=within[:, None], other=0.0)
        x -= tl.dot(left, tl.trans(right), input_precision=PRECISION)
        wide = x.to(tl.float64)
        energy += tl.sum(tl.reshape(wide * wide, [ROWS, COLUMNS // 4, 4]), axis=2)
        m_at += COLUMNS
        w_at += COLUMNS * K
    index = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(energies + index, tl.sum(energy))


@triton.jit
def update_kernel(
    table, numbers, found, u, w, factors, scales,
    TYPE: tl.constexpr, FOUND: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """X ← (1 − ηλ)X − η · scale · (M + U (factors W)ᵀ)."""
    row = table + tl.program_id(1).to(tl.int64) * FIELDS
    begin = tl.program_id(0) * ROWS
    m = field(row, ROWS_OF)
    if begin >= m or skipped(found, FOUND):
        return
    n = columns_of(row, ALIGNED)
    own = numbers + tl.program_id(1) * NUMBERS
    lr = tl.load(own).to(tl.float64, bitcast=True).to(tl.float32)
    address = tl.load(row + RATE)
    if address != 0:
        lr = tl.load(address.to(tl.pointer_type(tl.float32)))
    keep = 1 - lr * tl.load(own + 1).to(tl.float64, bitcast=True).to(tl.float32)
    rate = lr * tl.load(scales + tl.program_id(1))
    inside = begin + tl.arange(0, ROWS) < m
    columns, directions = tl.arange(0, COLUMNS), tl.arange(0, K)
    offsets = tl.arange(0, ROWS)[:, None] * n + columns[None, :]
    m_at = place(row, BUFFER, tl.float32, ALIGNED) + begin.to(tl.int64) * n
    x_at = place(row, WEIGHT, TYPE, ALIGNED) + begin.to(tl.int64) * n
    w_at = w + tl.load(row + PART) * K
    left_at = u + (tl.load(row + ROW) + begin) * K + tl.arange(0, ROWS)[:, None] * K + directions[None, :]
    left = tl.load(left_at, mask=inside[:, None], other=0.0)
    factor = tl.load(factors + tl.program_id(1) * K + directions)
    for start in range(0, n, COLUMNS):
        within = columns < n - start
        mask = inside[:, None] & within[None, :]
        right = tl.load(w_at + columns[:, None] * K + directions[None, :], mask=within[:, None], other=0.0)
        change = tl.load(m_at + offsets, mask=mask, other=0.0)
        change += tl.dot(left, tl.trans(right * factor[None, :]), input_precision=PRECISION)
        x = tl.load(x_at + offsets, mask=mask, other=0.0).to(tl.float32)
        x = x * keep - rate * change
        tl.store(x_at + offsets, narrowed(x, TYPE, x, False), mask=mask)
        m_at += COLUMNS
        x_at += COLUMNS
        w_at += COLUMNS * K
