"""A step of Spectra in Triton: momentum, products with the spikes' bases, and the update.

A kernel's program works on some rows, or columns, of one matrix. The grid's second dimension is the matrix, which has a
row in the table. Thin matrices, of k columns, are padded with zeros to the next power of two, and those of all matrices
of a call are consecutive; :mod:`.thin` has their algebra. Sums are taken in a fixed order, so that replicas get the
same bits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..costs import Cost, size
from ..spike import SpikeMatrix
from ..table import upload
from . import thin
from .common import mean_of, narrowed
from .operators import TYPES, launch, operator
from .thin import (
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
    blocks_of,
    columns_of,
    field,
    place,
    skipped,
)

__all__ = ["Tile", "spike_step"]


@dataclass
class Tile:
    """The tile of a matrix that a program works on at a time, and its launch options."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 2
    precision: str = "ieee"

    def of(self, k: int) -> dict[str, Any]:
        """The options of a launch."""
        sizes = {"K": k, "ROWS": self.rows, "COLUMNS": self.columns}
        return {**sizes, "PRECISION": self.precision, "num_warps": self.warps, "num_stages": self.stages}


#: The tile of every kernel that reads matrices, the fastest of several on an H200. The products that determine the
#: spike are in float32, which takes no longer than reading the matrix. The update's product would take longer, so it
#: uses three TF32 products, which are exact to a bit or two of float32.
TILES = {
    "product": Tile(64, 64),
    "transposed": Tile(32, 64, stages=3),
    "tail": Tile(64, 64),
    "update": Tile(64, 64, warps=8, stages=1, precision="tf32x3"),
}

#: Rows of a matrix that one program sums for its columns of MᵀU.
SPLIT = 1024


@triton.jit
def _product(
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
def _transposed(
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
def _tail(
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
def _update(
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


def _listed(matrices: Sequence[int]) -> list[SpikeMatrix]:
    numbers = iter(matrices)
    return list(map(SpikeMatrix, *[numbers] * len(SpikeMatrix._fields)))


def _parts(matrix: SpikeMatrix) -> int:
    """The number of rows of all parts of W."""
    return matrix.columns * blocks_of(matrix.rows, SPLIT)


def _width(matrices: Sequence[SpikeMatrix]) -> int:
    """The padded number of columns of thin matrices."""
    return max(16, 1 << (max(matrix.rank for matrix in matrices) - 1).bit_length())


def _calls(matrices: Sequence[SpikeMatrix], k: int) -> Iterator[tuple[int, int]]:
    """Ranges of matrices that are stepped in one call, whose thin matrices fit in the workspace."""
    begin = total = 0
    for index, matrix in enumerate(matrices):
        own = 4 * k * (matrix.rows + _parts(matrix) + matrix.columns)
        if total and total + own > thin.WORKSPACE_BYTES:
            yield begin, index
            begin, total = index, 0
        total += own
    yield begin, len(matrices)


def _cost(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    bases: Sequence[Tensor],
    records: Sequence[Tensor],
    lrs: Sequence[float],
    lr_tensors: Sequence[Tensor],
    lr_places: Sequence[int],
    weight_decays: Sequence[float],
    matrices: Sequence[int],
    decay: float,
    average: bool,
    steps: int,
    *rest: Any,
) -> Cost:
    listed = _listed(matrices)
    k = _width(listed)
    calls = len(list(_calls(listed, k)))
    # Every power step reads M twice, except that the first one reads it with the gradient. The tail is rarely formed.
    read = (2 * steps - 1) * size(buffers)
    thin_bytes = 4 * k * sum(steps * (9 * own.rows + 6 * _parts(own)) for own in listed)
    flops = 6 * k * sum((2 * steps + 1) * own.rows * own.columns for own in listed)
    return Cost(
        1 + calls * (10 * steps + 3),
        size(grads) + 3 * size(buffers) + read + 2 * size(weights) + 2 * size(bases, records) + thin_bytes,
        {"tf32": flops},
    )


@operator(
    "(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] buffers, Tensor(c!)[] bases, Tensor(d!)[] records, "
    "float[] lrs, Tensor[] lr_tensors, int[] lr_places, float[] weight_decays, int[] matrices, float decay, "
    "bool average, int steps, float[] scaling, Tensor? found) -> ()",
    mutates=("weights", "buffers", "bases", "records"),
    cost=_cost,
)
def spike_step(
    weights: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    bases: list[Tensor],
    records: list[Tensor],
    lrs: list[float],
    lr_tensors: list[Tensor],
    lr_places: list[int],
    weight_decays: list[float],
    matrices: list[int],
    decay: float,
    average: bool,
    steps: int,
    scaling: list[float],
    found: Tensor | None,
) -> None:
    """:func:`~spectrim.kernels.spike.spike_step` as an operator; ``matrices`` has the numbers of all SpikeMatrix."""
    device = weights[0].device
    listed = _listed(matrices)
    k = _width(listed)
    rms, *floors = scaling
    lists = (weights, grads, buffers, bases, records)
    addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in lists]
    sizes = [tensors[0].element_size() for tensors in lists]
    rates = [lr_tensors[at].data_ptr() if at >= 0 else 0 for at in lr_places]
    calls = list(_calls(listed, k))
    rows: list[list[int]] = []
    numbers: list[list[float]] = []
    extents: list[tuple[int, int, int]] = []
    bits = 0
    for first, last in calls:
        row = column = part = 0
        for tensor, start, m, n, rank, basis, stride, record in listed[first:last]:
            starts = (start, start, start, basis, record)
            own = [at[tensor] + begin * width for at, begin, width in zip(addresses, starts, sizes, strict=True)]
            bits |= own[0] | own[1] | own[2] | n
            rows.append([*own, rates[tensor], m, n, rank, stride, row, column, part])
            numbers.append([lrs[tensor], weight_decays[tensor], rms * (m * n) ** 0.5])
            row, column, part = row + m, column + n, part + n * blocks_of(m, SPLIT)
        extents.append((row, column, part))
    table = upload(device, rows, numbers)
    most = [max(extent[i] for extent in extents) for i in range(3)]
    u, w = (torch.empty((most[i], k), dtype=torch.float32, device=device) for i in (0, 2))
    scratch = torch.empty((most[1], k), dtype=torch.float32, device=device) if steps > 1 else table
    for first, last in calls:
        some = listed[first:last]
        grid = _Grid(max(own.rows for own in some), max(own.columns for own in some), last - first)
        work = thin.Thin(
            table=table[first * FIELDS.value :],
            numbers=table[len(listed) * FIELDS.value + first * NUMBERS.value :],
            found=table if found is None else found,
            u=u,
            w=w,
            scratch=scratch,
            options={"FOUND": found is not None},
            k=k,
            split=SPLIT,
            rows=grid.rows,
            columns=grid.columns,
            matrices=grid.matrices,
            tile=TILES["product"].rows,
            tail_tile=TILES["tail"].rows,
        )
        common = {"FOUND": found is not None, "ALIGNED": bits % 16 == 0}
        for power in range(steps):
            last_power = power == steps - 1
            tile = TILES["product"]
            launch(
                _product,
                (blocks_of(grid.rows, tile.rows), grid.matrices),
                device,
                work.table,
                work.found,
                scratch,
                u,
                work.energies,
                decay,
                1 - decay,
                TYPES[grads[0].dtype],
                (2 if average else 1) if power == 0 else 0,
                power > 0,
                **common,
                **tile.of(k),
            )
            work.orthonormalize()
            tile = TILES["transposed"]
            most_parts = max(blocks_of(own.columns, tile.columns) * blocks_of(own.rows, SPLIT) for own in some)
            launch(
                _transposed,
                (most_parts, grid.matrices),
                device,
                work.table,
                work.found,
                u,
                w,
                SPLIT,
                **common,
                **tile.of(k),
            )
            work.measure(tails=last_power)
            work.keep_basis(from_scratch=power > 0, to_scratch=not last_power)
        tile = TILES["tail"]
        launch(
            _tail,
            (blocks_of(grid.rows, tile.rows), grid.matrices),
            device,
            work.table,
            work.found,
            u,
            w,
            work.tails,
            work.tail_energies,
            **common,
            **tile.of(k),
        )
        work.shape(*floors)
        tile = TILES["update"]
        launch(
            _update,
            (blocks_of(grid.rows, tile.rows), grid.matrices),
            device,
            work.table,
            work.numbers,
            work.found,
            u,
            w,
            work.factors,
            work.scales,
            TYPES[weights[0].dtype],
            **common,
            **tile.of(k),
        )


class _Grid(NamedTuple):
    rows: int
    columns: int
    matrices: int
