"""The thin matrices, of k columns, of a step of Spectra in Triton, and the launches that work on them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import thin_kernels as kernels
from .operators import launch

__all__ = ["Thin", "blocks_of"]

#: The most bytes for the thin matrices of one call.
WORKSPACE_BYTES = 256 * 2**20

#: Rows whose Gram matrix one program sums, and rows that it loads at a time.
CHUNK = 512
GRAM_ROWS = 32

#: Rows of W, or of U, that one program works on.
THIN_ROWS = 64


def blocks_of(size: int, block: int) -> int:
    """The number of blocks that cover a size; Triton's own function takes longer than a launch."""
    return -(-size // block)


@dataclass(kw_only=True, eq=False)
class Thin:
    """The thin matrices of one call, and the launches that work on them.

    Attributes:
        table, numbers: the matrices' rows.
        found: the skip flag, or any tensor if ``options`` have FOUND False.
        u: M V, then U, of all matrices.
        w: the parts of W, then W in the first part.
        scratch: bases between power steps.
        options: of every launch.
        k: the padded number of columns.
        split: rows of a matrix whose sum is a part of W.
        rows, columns: the most of any matrix.
        matrices: their number.
        tile, tail_tile: rows of a block of ``energies`` and of ``tail_energies``.
        energies, tail_energies: ‖M‖² and the tail's energy by blocks of rows.
        tails: the tail's energy of every matrix, or −1.
        factors, scales: see :func:`.thin_kernels.shape_kernel`.
    """

    table: Tensor
    numbers: Tensor
    found: Tensor
    u: Tensor
    w: Tensor
    scratch: Tensor
    options: dict[str, Any]
    k: int
    split: int
    rows: int
    columns: int
    matrices: int
    tile: int
    tail_tile: int

    def __post_init__(self) -> None:
        rows, k, matrices = self.rows, self.k, self.matrices
        self.chunks, self.blocks, self.column_blocks = (
            blocks_of(size, step) for size, step in ((rows, CHUNK), (rows, THIN_ROWS), (self.columns, THIN_ROWS))
        )
        self.energy_blocks, self.tail_blocks = blocks_of(rows, self.tile), blocks_of(rows, self.tail_tile)
        sizes = [k * k * self.chunks, k * k, k * self.column_blocks, k, 1, self.energy_blocks, self.tail_blocks]
        wide = torch.empty(sum(sizes) * matrices, dtype=torch.float64, device=self.u.device)
        self.grams, self.roots, self.squares, self.lengths, self.tails, self.energies, self.tail_energies = wide.split(
            [matrices * size for size in sizes]
        )
        self.factors, self.scales = torch.empty((k + 1) * matrices, dtype=torch.float32, device=self.u.device).split(
            [k * matrices, matrices]
        )

    def orthonormalize(self) -> None:
        """U ← orth(U), by Cholesky-QR, twice."""
        for second in (False, True):
            grid, tensors = (self.chunks, self.matrices), (self.u, self.roots, self.grams)
            self._launch(kernels.gram_kernel, grid, *tensors, second, CHUNK, ROWS=GRAM_ROWS)
            self._launch(kernels.factor_kernel, self.matrices, self.grams, self.roots, self.chunks, second, CHUNK)
        self._launch(kernels.orthonormal_kernel, (self.blocks, self.matrices), self.u, self.roots, ROWS=THIN_ROWS)

    def measure(self, *, tails: bool) -> None:
        """Sum the parts of W, and compute the lengths of its columns; with ``tails``, also the tails' energies."""
        grid = (self.column_blocks, self.matrices)
        self._launch(kernels.collected_kernel, grid, self.w, self.squares, self.split, ROWS=THIN_ROWS)
        tensors = (self.squares, self.energies, self.lengths, self.tails)
        blocks = (self.column_blocks, self.energy_blocks)
        sizes = {"ROWS": THIN_ROWS, "TILE": self.tile, "TOGETHER": 16}
        self._launch(kernels.measured_kernel, self.matrices, *tensors, *blocks, tails, **sizes)

    def keep_basis(self, *, from_scratch: bool, to_scratch: bool) -> None:
        """Store the new bases in the state or, between power steps, in the scratch memory."""
        grid, tensors = (self.column_blocks, self.matrices), (self.scratch, self.w, self.lengths)
        self._launch(kernels.basis_kernel, grid, *tensors, from_scratch, to_scratch, ROWS=THIN_ROWS)

    def shape(self, keep: float, share: float, floor: float) -> None:
        """Compute factors and scales, see :func:`.thin_kernels.shape_kernel`."""
        tensors = (self.lengths, self.tails, self.tail_energies, self.factors, self.scales)
        numbers = (self.tail_blocks, keep, share, floor)
        options = {**self.options, "K": self.k, "TILE": self.tail_tile, "num_warps": 4}
        lists = (self.table, self.numbers, self.found, *tensors)
        launch(kernels.shape_kernel, self.matrices, self.u.device, *lists, *numbers, **options)

    def _launch(self, kernel: Any, grid: int | tuple[int, ...], *args: Any, **constants: Any) -> None:
        options = {**constants, **self.options, "K": self.k, "num_warps": 4}
        launch(kernel, grid, self.u.device, self.table, self.found, *args, **options)
