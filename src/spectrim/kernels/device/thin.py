"""The algebra of thin matrices, of k columns, in a step of Spectra in Triton.

It follows :mod:`spectrim.operators.spike` in float64: Cholesky-QR of M V twice, the lengths of W's columns, the energy
of the tail, and the new bases. A kernel's program works on one matrix, or on some of its rows or columns.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spike import DEAD_DIRECTION, DEPENDENT, EMPTY_TAIL, PLAIN_TAIL, SHIFT, SMALLEST
from .operators import launch

__all__ = ["Thin", "blocks_of", "columns_of", "field", "place", "skipped"]

#: The most bytes for the thin matrices of one call.
WORKSPACE_BYTES = 256 * 2**20

#: Rows whose Gram matrix one program sums, and rows that it loads at a time.
CHUNK = 512
GRAM_ROWS = 32

#: Rows of W, or of U, that one program works on.
THIN_ROWS = 64

#: The table's row of a matrix: addresses, sizes, and the first rows of its thin matrices. BASIS is (columns, rank) with
#: STRIDE entries from row to row; RATE is the address of a learning rate, or 0.
WEIGHT, GRAD, BUFFER, BASIS, RECORD, RATE, ROWS_OF, COLUMNS_OF, RANK, STRIDE, ROW, COLUMN, PART = map(
    tl.constexpr, range(13)
)
FIELDS = tl.constexpr(13)
#: The table's float64 row of a matrix: learning rate, weight decay, and the norm of its update.
NUMBERS = tl.constexpr(3)

SMALLEST_LENGTH = tl.constexpr(SMALLEST)
LEAST_PIVOT = tl.constexpr(SHIFT)
LEAST_ROOT = tl.constexpr(DEPENDENT)
DEAD = tl.constexpr(DEAD_DIRECTION)
PLAIN = tl.constexpr(PLAIN_TAIL)
EMPTY = tl.constexpr(EMPTY_TAIL)


def blocks_of(size: int, block: int) -> int:
    """The number of blocks that cover a size; Triton's own function takes longer than a launch."""
    return -(-size // block)


@triton.jit
def field(row, FIELD: tl.constexpr):
    """A size of the table."""
    return tl.load(row + FIELD).to(tl.int32)


@triton.jit
def columns_of(row, ALIGNED: tl.constexpr):
    """The number of columns of a matrix."""
    # Not by `field`, since the alignment hint would be lost when that call is inlined.
    n = tl.load(row + COLUMNS_OF).to(tl.int32)
    if ALIGNED:
        n = tl.multiple_of(n, 16)
    return n


@triton.jit
def place(row, FIELD: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An address of the table."""
    address = tl.load(row + FIELD).to(tl.pointer_type(TYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def skipped(found, FOUND: tl.constexpr):
    """True if the whole step is skipped."""
    return tl.load(found) != 0 if FOUND else False


@triton.jit
def _gram(
    table, found, y, factors, grams,
    SECOND: tl.constexpr, CHUNK: tl.constexpr, FOUND: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """YᵀY of some rows of Y, or in the second pass of Y times the first pass's factor."""
    row = table + tl.program_id(1).to(tl.int64) * FIELDS
    first = tl.program_id(0) * CHUNK
    m = field(row, ROWS_OF)
    if first >= m or skipped(found, FOUND):
        return
    rows, directions = tl.arange(0, ROWS), tl.arange(0, K)
    square = tl.arange(0, K)[:, None] * K + directions[None, :]
    at = y + (tl.load(row + ROW) + first) * K + rows[:, None] * K + directions[None, :]
    gram = tl.zeros([K, K], tl.float64)
    for begin in range(first, tl.minimum(m, first + CHUNK), ROWS):
        q = tl.load(at, mask=(rows < m - begin)[:, None], other=0.0).to(tl.float64)
        if SECOND:
            q = tl.dot(q, tl.load(factors + tl.program_id(1) * K * K + square), out_dtype=tl.float64)
        gram = tl.dot(tl.trans(q), q, gram, out_dtype=tl.float64)
        at += ROWS * K
    index = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(grams + index * K * K + square, gram)


@triton.jit
def _factor(
    table, found, grams, factors, chunks,
    SECOND: tl.constexpr, CHUNK: tl.constexpr, FOUND: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The inverse transpose of the Gram matrix's Cholesky factor, which orthonormalises the columns."""
    row = table + tl.program_id(0).to(tl.int64) * FIELDS
    if skipped(found, FOUND):
        return
    rows, columns = tl.arange(0, K)[:, None], tl.arange(0, K)[None, :]
    square = rows * K + columns
    at = grams + tl.program_id(0).to(tl.int64) * chunks * K * K + square
    gram = tl.load(at)
    for _ in range(1, tl.cdiv(field(row, ROWS_OF), CHUNK)):
        at += K * K
        gram += tl.load(at)
    diagonal = rows == columns
    if not SECOND:
        kept = tl.where(diagonal, gram, 0.0)
        # The same vector in two layouts, for rows and for columns.
        down = tl.maximum(tl.sqrt(tl.sum(kept, axis=1)), SMALLEST_LENGTH)
        along = tl.maximum(tl.sqrt(tl.sum(kept, axis=0)), SMALLEST_LENGTH)
        gram = gram / down[:, None] / along[None, :]
        gram = tl.where(diagonal, tl.maximum(gram, 1 + LEAST_PIVOT), gram)
    else:
        gram = tl.where(diagonal, tl.maximum(gram, LEAST_PIVOT), gram)
    inverse = tl.where(diagonal, 1.0, 0.0).to(tl.float64)
    roots = tl.zeros([K], tl.float64)
    for j in range(K):
        column = tl.sum(tl.where(columns == j, gram, 0.0), axis=1)[:, None]
        line = tl.sum(tl.where(rows == j, gram, 0.0), axis=0)[None, :]
        pivot = tl.sum(tl.where(rows == j, column, 0.0))
        root = tl.sqrt(tl.maximum(pivot, LEAST_PIVOT * LEAST_PIVOT))
        column = tl.where(rows >= j, column / root, 0.0)
        gram -= column * tl.where(columns >= j, line / root, 0.0)
        own = tl.sum(tl.where(rows == j, inverse, 0.0), axis=0)[None, :] / root
        inverse = tl.where(rows == j, own, inverse - tl.where(rows > j, column, 0.0) * own)
        roots = tl.where(tl.arange(0, K) == j, root, roots)
    at = factors + tl.program_id(0) * K * K
    if SECOND:
        result = tl.dot(tl.load(at + square), tl.trans(inverse), out_dtype=tl.float64)
    else:
        # Columns that depend on the columns before them become zero.
        result = tl.where((roots > LEAST_ROOT)[None, :], tl.trans(inverse) / down[:, None], 0.0)
    tl.store(at + square, result)


@triton.jit
def _orthonormal(
    table, found, y, factors, FOUND: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Y times its factor, in place."""
    row = table + tl.program_id(1).to(tl.int64) * FIELDS
    begin = tl.program_id(0) * ROWS
    m = field(row, ROWS_OF)
    if begin >= m or skipped(found, FOUND):
        return
    rows, directions = tl.arange(0, ROWS), tl.arange(0, K)
    at = y + (tl.load(row + ROW) + begin) * K + rows[:, None] * K + directions[None, :]
    mask = (begin + rows < m)[:, None]
    q = tl.load(at, mask=mask, other=0.0).to(tl.float64)
    square = tl.arange(0, K)[:, None] * K + directions[None, :]
    q = tl.dot(q, tl.load(factors + tl.program_id(1) * K * K + square), out_dtype=tl.float64)
    tl.store(at, q.to(tl.float32), mask=mask)


@triton.jit
def _collected(
    table, found, w, squares, SPLIT: tl.constexpr, FOUND: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sum the parts of some rows of W into the first part, and store the squared lengths of its columns."""
    row = table + tl.program_id(1).to(tl.int64) * FIELDS
    start = tl.program_id(0) * ROWS
    n = field(row, COLUMNS_OF)
    if start >= n or skipped(found, FOUND):
        return
    rows, directions = tl.arange(0, ROWS), tl.arange(0, K)
    first = w + (tl.load(row + PART) + start) * K + rows[:, None] * K + directions[None, :]
    mask = (start + rows < n)[:, None]
    total = tl.load(first, mask=mask, other=0.0)
    at = first
    splits = tl.cdiv(field(row, ROWS_OF), SPLIT)
    for _ in range(1, splits):
        at += n * K
        total += tl.load(at, mask=mask, other=0.0)
    if splits > 1:
        tl.store(first, total, mask=mask)
    wide = total.to(tl.float64)
    index = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(squares + index * K + directions, tl.sum(wide * wide, axis=0))


@triton.jit
def _summed(source, count, BLOCK: tl.constexpr):
    """The sum of ``count`` float64 numbers."""
    total = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, count, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        total += tl.load(source + at, mask=at < count, other=0.0)
    return tl.sum(total)


@triton.jit
def _measured(
    table, found, squares, energies, lengths, tails, square_blocks, energy_blocks,
    TAILS: tl.constexpr, FOUND: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """The lengths of W's columns, and the tail's energy, or −1 if the difference of energies is too inaccurate."""
    row = table + tl.program_id(0).to(tl.int64) * FIELDS
    if skipped(found, FOUND):
        return
    directions = tl.arange(0, K)
    own = squares + tl.program_id(0).to(tl.int64) * square_blocks * K
    count = tl.cdiv(field(row, COLUMNS_OF), ROWS)
    total = tl.zeros([TOGETHER, K], tl.float64)
    for begin in range(0, count, TOGETHER):
        at = begin + tl.arange(0, TOGETHER)
        total += tl.load(own + at[:, None] * K + directions[None, :], mask=(at < count)[:, None], other=0.0)
    energy = tl.sum(total, axis=0)
    tl.store(lengths + tl.program_id(0) * K + directions, tl.sqrt(energy))
    if TAILS:
        spike = tl.sum(energy)
        source = energies + tl.program_id(0).to(tl.int64) * energy_blocks
        difference = _summed(source, tl.cdiv(field(row, ROWS_OF), TILE), 128) - spike
        # A difference that is small against the spike is inaccurate.
        tl.store(tails + tl.program_id(0), tl.where(difference > PLAIN * spike, difference, -1.0))


@triton.jit
def _basis(
    table, found, scratch, w, lengths, FROM_SCRATCH: tl.constexpr, TO_SCRATCH: tl.constexpr, FOUND: tl.constexpr,
    K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The new basis: the columns of W at unit length; columns of length zero keep the old basis."""
    row = table + tl.program_id(1).to(tl.int64) * FIELDS
    start = tl.program_id(0) * ROWS
    n = field(row, COLUMNS_OF)
    if start >= n or skipped(found, FOUND):
        return
    rows, directions = tl.arange(0, ROWS), tl.arange(0, K)
    state_at = place(row, BASIS, tl.float32, False)
    state_at += (start + rows)[:, None] * field(row, STRIDE) + directions[None, :]
    scratch_at = scratch + (tl.load(row + COLUMN) + start) * K + rows[:, None] * K + directions[None, :]
    mask = (start + rows < n)[:, None] & (directions < field(row, RANK))[None, :]
    old = tl.load(scratch_at if FROM_SCRATCH else state_at, mask=mask, other=0.0)
    at = w + (tl.load(row + PART) + start) * K + rows[:, None] * K + directions[None, :]
    length = tl.load(lengths + tl.program_id(1) * K + directions)
    alive = length > DEAD * tl.max(length)
    # In float64, since the length of a denormal column has few digits in float32.
    unit = tl.load(at, mask=mask, other=0.0).to(tl.float64) / tl.where(alive, length, 1.0)[None, :]
    new = tl.where(alive[None, :], unit.to(tl.float32), old)
    tl.store(scratch_at if TO_SCRATCH else state_at, new, mask=mask)


@triton.jit
def _shape(
    table, numbers, found, lengths, tails, energies, factors, scales, energy_blocks, keep, share, floor,
    FOUND: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Compute the factors on W's columns that shrink the spike, and the scales that give updates their norms."""
    row = table + tl.program_id(0).to(tl.int64) * FIELDS
    if skipped(found, FOUND):
        return
    m, n, k = field(row, ROWS_OF), field(row, COLUMNS_OF), field(row, RANK)
    tail = tl.load(tails + tl.program_id(0))
    if tail < 0:
        tail = _summed(energies + tl.program_id(0).to(tl.int64) * energy_blocks, tl.cdiv(m, TILE), 128)
    directions = tl.arange(0, K)
    length = tl.load(lengths + tl.program_id(0) * K + directions)
    whole = tail + tl.sum(length * length)
    spare = tl.minimum(m, n) - k
    sigma = tl.sqrt(tail / tl.maximum(spare, 1).to(tl.float64))
    # A direction without energy stays as it is, since raising it to the tail's scale would add noise.
    shrinks = (spare > 0) & (tail > EMPTY * whole)
    alive = (length > DEAD * tl.sqrt(whole)) & shrinks
    factor = tl.where(alive, sigma / tl.where(alive, length, 1.0) - 1, 0.0)
    tl.store(factors + tl.program_id(0) * K + directions, factor.to(tl.float32))
    norm = tl.sqrt(tail + tl.sum(tl.where(alive, sigma * sigma, length * length))).to(tl.float32)
    record_at = place(row, RECORD, tl.float32, False)
    record = tl.maximum(norm, tl.load(record_at) * keep)
    tl.store(record_at, record)
    norm = tl.maximum(norm, share * record)
    aim = tl.load(numbers + tl.program_id(0) * NUMBERS + 2).to(tl.float64, bitcast=True).to(tl.float32)
    tl.store(scales + tl.program_id(0), tl.where(norm > floor, aim / tl.maximum(norm, floor), 0.0))


class Thin:
    """The thin matrices of one call, and the launches that work on them.

    Attributes:
        table, numbers: the matrices' rows.
        found: the skip flag, or any tensor if ``options`` have FOUND False.
        u: M V, then U, of all matrices.
        w: the parts of W, then W in the first part.
        scratch: bases between power steps.
        energies, tail_energies: ‖M‖² and the tail's energy by blocks of rows.
        tails: the tail's energy of every matrix, or −1.
        factors, scales: see :func:`_shape`.
    """

    def __init__(
        self,
        *,
        table: Tensor,
        numbers: Tensor,
        found: Tensor,
        u: Tensor,
        w: Tensor,
        scratch: Tensor,
        options: dict[str, Any],
        k: int,
        split: int,
        rows: int,
        columns: int,
        matrices: int,
        tile: int,
        tail_tile: int,
    ) -> None:
        self.table, self.numbers, self.found = table, numbers, found
        self.u, self.w, self.scratch, self.options, self.k, self.split = u, w, scratch, options, k, split
        self.matrices, self.tile, self.tail_tile = matrices, tile, tail_tile
        self.chunks, self.blocks, self.column_blocks = (
            blocks_of(size, step) for size, step in ((rows, CHUNK), (rows, THIN_ROWS), (columns, THIN_ROWS))
        )
        self.energy_blocks, self.tail_blocks = blocks_of(rows, tile), blocks_of(rows, tail_tile)
        sizes = [k * k * self.chunks, k * k, k * self.column_blocks, k, 1, self.energy_blocks, self.tail_blocks]
        wide = torch.empty(sum(sizes) * matrices, dtype=torch.float64, device=u.device)
        self.grams, self.roots, self.squares, self.lengths, self.tails, self.energies, self.tail_energies = wide.split(
            [matrices * size for size in sizes]
        )
        self.factors, self.scales = torch.empty((k + 1) * matrices, dtype=torch.float32, device=u.device).split(
            [k * matrices, matrices]
        )

    def orthonormalize(self) -> None:
        """U ← orth(U), by Cholesky-QR, twice."""
        for second in (False, True):
            self._launch(
                _gram, (self.chunks, self.matrices), self.u, self.roots, self.grams, second, CHUNK, ROWS=GRAM_ROWS
            )
            self._launch(_factor, self.matrices, self.grams, self.roots, self.chunks, second, CHUNK)
        self._launch(_orthonormal, (self.blocks, self.matrices), self.u, self.roots, ROWS=THIN_ROWS)

    def measure(self, *, tails: bool) -> None:
        """Sum the parts of W, and compute the lengths of its columns; with ``tails``, also the tails' energies."""
        grid = (self.column_blocks, self.matrices)
        self._launch(_collected, grid, self.w, self.squares, self.split, ROWS=THIN_ROWS)
        self._launch(
            _measured,
            self.matrices,
            self.squares,
            self.energies,
            self.lengths,
            self.tails,
            self.column_blocks,
            self.energy_blocks,
            tails,
            ROWS=THIN_ROWS,
            TILE=self.tile,
            TOGETHER=16,
        )

    def keep_basis(self, *, from_scratch: bool, to_scratch: bool) -> None:
        """Store the new bases in the state or, between power steps, in the scratch memory."""
        grid = (self.column_blocks, self.matrices)
        self._launch(_basis, grid, self.scratch, self.w, self.lengths, from_scratch, to_scratch, ROWS=THIN_ROWS)

    def shape(self, keep: float, share: float, floor: float) -> None:
        """Compute factors and scales, see :func:`_shape`."""
        launch(
            _shape,
            self.matrices,
            self.u.device,
            self.table,
            self.numbers,
            self.found,
            self.lengths,
            self.tails,
            self.tail_energies,
            self.factors,
            self.scales,
            self.tail_blocks,
            keep,
            share,
            floor,
            **self.options,
            K=self.k,
            TILE=self.tail_tile,
            num_warps=4,
        )

    def _launch(self, kernel: Any, grid: int | tuple[int, ...], *args: Any, **constants: Any) -> None:
        launch(
            kernel,
            grid,
            self.u.device,
            self.table,
            self.found,
            *args,
            **constants,
            **self.options,
            K=self.k,
            num_warps=4,
        )
