"""Products with symmetric results or factors in Triton.

For a symmetric result, tiles on and below the diagonal are computed, and also written to the other triangle.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..costs import Cost, size
from .common import narrowed
from .operators import launch, operator

__all__ = ["gram_product", "product_less", "symmetric_product"]


@triton.jit
def _coefficient(vector, number, matrix, VECTOR: tl.constexpr):
    if VECTOR:
        return tl.load(vector + matrix)
    return number


@triton.jit
def _kernel(
    a, b, c, out, alphas, betas, gammas, alpha, beta, gamma, size, depth,
    a_matrix, a_row, a_column, b_matrix, b_row, b_column, c_matrix, c_row, c_column, out_matrix,
    ADDS: tl.constexpr, ALPHAS: tl.constexpr, BETAS: tl.constexpr, GAMMAS: tl.constexpr,
    WHOLE_ROWS: tl.constexpr, WHOLE_DEPTH: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # RATIO tiles of ROWS x COLUMNS form a square. Programs number the tiles on and below the diagonal row by row; the
    # row is the root of a quadratic equation, corrected for rounding.
    RATIO: tl.constexpr = ROWS // COLUMNS
    program = tl.program_id(0)
    matrix = tl.program_id(1).to(tl.int64)
    square = program // RATIO
    row = ((tl.sqrt(8.0 * square + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > square, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= square, row + 1, row)
    column = program - RATIO * (row * (row + 1) // 2)
    rows = row * ROWS + tl.arange(0, ROWS)
    columns = column * COLUMNS + tl.arange(0, COLUMNS)
    steps = tl.arange(0, DEPTH)
    # Rows beyond the edge load the first row, and are not stored.
    safe_rows = rows if WHOLE_ROWS else tl.where(rows < size, rows, 0)
    safe_columns = columns if WHOLE_ROWS else tl.where(columns < size, columns, 0)
    left = a + matrix * a_matrix + safe_rows[:, None] * a_row + steps[None, :] * a_column
    right = b + matrix * b_matrix + safe_columns[None, :] * b_row + steps[:, None] * b_column
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, depth, DEPTH):
        if WHOLE_DEPTH:
            x = tl.load(left)
            y = tl.load(right)
        else:
            rest = depth - begin
            x = tl.load(left, mask=steps[None, :] < rest, other=0.0)
            y = tl.load(right, mask=steps[:, None] < rest, other=0.0)
        if WIDE:
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        total = tl.dot(x, y, total)
        left += DEPTH * a_column
        right += DEPTH * b_column
    total *= _coefficient(alphas, alpha, matrix, ALPHAS)
    inside = (rows[:, None] < size) & (columns[None, :] < size)
    if ADDS:
        added = c + matrix * c_matrix + rows[:, None] * c_row + columns[None, :] * c_column
        extra = tl.load(added) if WHOLE_ROWS else tl.load(added, mask=inside, other=0.0)
        total += _coefficient(betas, beta, matrix, BETAS) * extra.to(tl.float32)
    lower = out + matrix * out_matrix + rows[:, None] * size + columns[None, :]
    upper = out + matrix * out_matrix + columns[:, None] * size + rows[None, :]
    mirrored = (columns[:, None] < size) & (rows[None, :] < size)
    if column >= RATIO * row:
        # Entries above the diagonal are copies of those below it, so that no two threads write to the same address.
        shift = _coefficient(gammas, gamma, matrix, GAMMAS)
        total = tl.where(rows[:, None] == columns[None, :], total + shift, total)
        rounded = narrowed(total, out.dtype.element_ty, total, False)
        tl.store(lower, rounded, mask=inside & (rows[:, None] >= columns[None, :]))
        tl.store(upper, tl.trans(rounded), mask=mirrored & (columns[:, None] < rows[None, :]))
    else:
        rounded = narrowed(total, out.dtype.element_ty, total, False)
        if WHOLE_ROWS:
            tl.store(lower, rounded)
            tl.store(upper, tl.trans(rounded))
        else:
            tl.store(lower, rounded, mask=inside)
            tl.store(upper, tl.trans(rounded), mask=mirrored)


class Tiles(NamedTuple):
    """The tile sizes and launch options of a product; depth is that of one step of its loop."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """The options of a launch."""
        sizes = {"ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth}
        return {**sizes, "num_warps": self.warps, "num_stages": self.stages}

    def count(self, size: int) -> int:
        """The number of tiles on and below the diagonal."""
        rows = math.ceil(size / self.rows)
        return rows * (rows + 1) // 2 * (self.rows // self.columns)


def _tiles(size: int) -> Tiles:
    return Tiles(128, 128, 64, 8, 4) if size > 128 else Tiles(64, 64, 64, 4, 3)


def _cost(a: Tensor, b: Tensor | None, c: Tensor | None, *rest: Any) -> Cost:
    matrices, rows, depth = a.shape
    read = [tensor for tensor in (a, b, c) if tensor is not None]
    tiles = _tiles(rows)
    flops = 2 * matrices * tiles.count(rows) * tiles.rows * tiles.columns * depth
    return Cost(1, size(read) + matrices * rows * rows * a.element_size(), {str(a.dtype).removeprefix("torch."): flops})


@operator(
    fake=lambda a, *rest: a.new_empty(a.shape[0], a.shape[1], a.shape[1]),
    cost=_cost,
)
def symmetric_product(
    a: Tensor,
    b: Tensor | None,
    c: Tensor | None,
    alphas: Tensor | None,
    betas: Tensor | None,
    gammas: Tensor | None,
    alpha: float,
    beta: float,
    gamma: float,
) -> Tensor:
    """:func:`~spectrim.kernels.symmetric.symmetric_product` as an operator."""
    out = a.new_empty(a.shape[0], a.shape[1], a.shape[1])
    _launch(a, b, c, (alphas, betas, gammas), (alpha, beta, gamma), out)
    return out


@operator(
    mutates=("out",),
    cost=lambda a, gammas, out: _cost(a, None, None),
)
def gram_product(a: Tensor, gammas: Tensor | None, out: Tensor) -> None:
    """Store A Aᵀ + γ I in a given stack of contiguous matrices."""
    _launch(a, None, None, (None, None, gammas), (1.0, 1.0, 0.0), out)


def _launch(
    a: Tensor,
    b: Tensor | None,
    c: Tensor | None,
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None],
    numbers: tuple[float, float, float],
    out: Tensor,
) -> None:
    matrices, rows, depth = a.shape
    tiles = _tiles(rows)
    # Rows of B are read instead of columns, since B is symmetric.
    second = a if b is None else b
    added = out if c is None else c
    launch(
        _kernel,
        (tiles.count(rows), matrices),
        a.device,
        a,
        second,
        added,
        out,
        *(out if vector is None else vector for vector in vectors),
        *numbers,
        rows,
        depth,
        *a.stride(),
        *second.stride(),
        *added.stride(),
        out.stride(0),
        c is not None,
        *(vector is not None for vector in vectors),
        rows % tiles.rows == 0,
        depth % tiles.depth == 0,
        # The interpreter has no products in bfloat16; float32 gives the same numbers.
        a.device.type == "cpu" and a.dtype == torch.bfloat16,
        **tiles.options,
    )


@triton.jit
def _remainder_kernel(
    s, y, x, out, factors, size, width, y_matrix, y_row, y_column, x_matrix, x_row, x_column,
    out_matrix, out_row, out_column, s_matrix,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # Consecutive programs compute tiles of one column, which read the same part of Y.
    tiles = tl.cdiv(size, ROWS)
    program = tl.program_id(0)
    matrix = tl.program_id(1).to(tl.int64)
    rows = (program % tiles) * ROWS + tl.arange(0, ROWS)
    columns = (program // tiles) * COLUMNS + tl.arange(0, COLUMNS)
    steps = tl.arange(0, DEPTH)
    safe_rows = rows if WHOLE else tl.where(rows < size, rows, 0)
    safe_columns = columns if WHOLE else tl.where(columns < width, columns, 0)
    left = s + matrix * s_matrix + safe_rows[:, None] * size + steps[None, :]
    right = y + matrix * y_matrix + steps[:, None] * y_row + safe_columns[None, :] * y_column
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, size, DEPTH):
        if WHOLE:
            a = tl.load(left)
            b = tl.load(right)
        else:
            rest = size - begin
            a = tl.load(left, mask=steps[None, :] < rest, other=0.0)
            b = tl.load(right, mask=steps[:, None] < rest, other=0.0)
        total = tl.dot(a, b, total)
        left += DEPTH
        right += DEPTH * y_row
    inside = (rows[:, None] < size) & (columns[None, :] < width)
    whole = x + matrix * x_matrix + safe_rows[:, None] * x_row + safe_columns[None, :] * x_column
    # Multiplied twice by the factor's root, since the factor may overflow float32.
    root = tl.sqrt(tl.load(factors + matrix).to(tl.float64)).to(tl.float32)
    total -= tl.load(whole) * root * root
    target = out + matrix * out_matrix + rows[:, None] * out_row + columns[None, :] * out_column
    if WHOLE:
        tl.store(target, total.to(out.dtype.element_ty))
    else:
        tl.store(target, total.to(out.dtype.element_ty), mask=inside)


def _remainder_cost(s: Tensor, y: Tensor, x: Tensor, factors: Tensor) -> Cost:
    flops = 2 * s.shape[1] * y.numel()
    return Cost(1, size([s, y, y, x]), {str(y.dtype).removeprefix("torch."): flops})


@operator(
    fake=lambda s, y, x, factors: torch.empty_like(y),
    cost=_remainder_cost,
)
def product_less(s: Tensor, y: Tensor, x: Tensor, factors: Tensor) -> Tensor:
    """:func:`~spectrim.kernels.symmetric.product_less` as an operator."""
    out = torch.empty_like(y)
    matrices, rows, width = y.shape
    tiles = Tiles(128, 128, 64, 4, 3) if min(rows, width) > 128 else Tiles(64, 64, 64, 4, 3)
    launch(
        _remainder_kernel,
        (math.ceil(rows / tiles.rows) * math.ceil(width / tiles.columns), matrices),
        y.device,
        s,
        y,
        x,
        out,
        factors,
        rows,
        width,
        *y.stride(),
        *x.stride(),
        *out.stride(),
        s.stride(0),
        rows % tiles.rows == 0 and width % tiles.columns == 0 and rows % tiles.depth == 0,
        **tiles.options,
    )
    return out
