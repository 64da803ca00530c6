"""Symmetric products in Triton: the tiles on and below the diagonal are computed, and each is written twice."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..costs import Cost, size
from .common import narrowed
from .operators import launch, operator

__all__ = ["symmetric_product"]


@triton.jit
def _coefficient(vector, number, matrix, VECTOR: tl.constexpr):
    if VECTOR:
        return tl.load(vector + matrix)
    return number


@triton.jit
def _kernel(
    a, b, c, out, alphas, betas, gammas, alpha, beta, gamma, size, depth,
    a_matrix, a_row, a_column, b_matrix, b_row, b_column, c_matrix, c_row, c_column,
    ADDS: tl.constexpr, ALPHAS: tl.constexpr, BETAS: tl.constexpr, GAMMAS: tl.constexpr,
    WHOLE_ROWS: tl.constexpr, WHOLE_DEPTH: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # Programs count the tiles on and below the diagonal row by row; the row is the root of a quadratic, to rounding.
    program = tl.program_id(0)
    matrix = tl.program_id(1).to(tl.int64)
    row = ((tl.sqrt(8.0 * program + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > program, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= program, row + 1, row)
    column = program - row * (row + 1) // 2
    rows = row * TILE + tl.arange(0, TILE)
    columns = column * TILE + tl.arange(0, TILE)
    steps = tl.arange(0, DEPTH)
    # Rows beyond the edge read the first one, and are not written.
    safe_rows = rows if WHOLE_ROWS else tl.where(rows < size, rows, 0)
    safe_columns = columns if WHOLE_ROWS else tl.where(columns < size, columns, 0)
    left = a + matrix * a_matrix + safe_rows[:, None] * a_row + steps[None, :] * a_column
    right = b + matrix * b_matrix + safe_columns[None, :] * b_row + steps[:, None] * b_column
    total = tl.zeros([TILE, TILE], tl.float32)
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
    lower = out + matrix * size * size + rows[:, None] * size + columns[None, :]
    upper = out + matrix * size * size + columns[:, None] * size + rows[None, :]
    mirrored = (columns[:, None] < size) & (rows[None, :] < size)
    if row == column:
        # Entries above the diagonal are those below it, so that no two threads write to one place.
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


def _shape(size: int) -> tuple[int, int, int]:
    """Tile, depth of a step and warps: large tiles as soon as there are several of them."""
    return (128, 64, 8) if size > 128 else (64, 64, 4)


def _tiles(size: int) -> int:
    rows = math.ceil(size / _shape(size)[0])
    return rows * (rows + 1) // 2


def _fake(a: Tensor, *rest: Any) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[1], a.shape[1])


def _cost(a: Tensor, b: Tensor | None, c: Tensor | None, *rest: Any) -> Cost:
    matrices, rows, depth = a.shape
    read = [tensor for tensor in (a, b, c) if tensor is not None]
    flops = 2 * matrices * _tiles(rows) * _shape(rows)[0] ** 2 * depth
    return Cost(1, size(read) + matrices * rows * rows * a.element_size(), {str(a.dtype).removeprefix("torch."): flops})


@operator(
    "(Tensor a, Tensor? b, Tensor? c, Tensor? alphas, Tensor? betas, Tensor? gammas, float alpha, float beta, "
    "float gamma) -> Tensor",
    fake=_fake,
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
    matrices, rows, depth = a.shape
    out = a.new_empty(matrices, rows, rows)
    tile, step, warps = _shape(rows)
    # B is symmetric: its rows are read where its columns are meant, as they are of A.
    second = a if b is None else b
    added = out if c is None else c
    launch(
        _kernel,
        (_tiles(rows), matrices),
        a.device,
        a,
        second,
        added,
        out,
        *(out if vector is None else vector for vector in (alphas, betas, gammas)),
        alpha,
        beta,
        gamma,
        rows,
        depth,
        *a.stride(),
        *second.stride(),
        *added.stride(),
        c is not None,
        alphas is not None,
        betas is not None,
        gammas is not None,
        rows % tile == 0,
        depth % step == 0,
        # The interpreter has no products in bfloat16; the numbers are the same.
        a.device.type == "cpu" and a.dtype == torch.bfloat16,
        TILE=tile,
        DEPTH=step,
        num_warps=warps,
        num_stages=3,
    )
    return out
