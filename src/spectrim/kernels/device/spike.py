"""A step of Spectra in Triton, as an operator: kernels that read matrices, and :mod:`.thin` matrices between them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..costs import Cost, size
from ..spike import SpikeMatrix
from ..table import upload
from . import spike_kernels as kernels
from . import thin
from .operators import TYPES, addresses_at, launch, operator
from .thin import blocks_of
from .thin_kernels import FIELDS, NUMBERS

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
    calls = list(_calls(listed, k))
    rates = addresses_at(lr_tensors, lr_places)
    rows, extents, aligned = _rows((weights, grads, buffers, bases, records), rates, listed, calls)
    numbers = [[lrs[own.tensor], weight_decays[own.tensor], rms * (own.rows * own.columns) ** 0.5] for own in listed]
    table = upload(device, rows, numbers)
    most = [max(sizes) for sizes in zip(*extents, strict=True)]
    u, w = (torch.empty((most[i], k), dtype=torch.float32, device=device) for i in (0, 2))
    scratch = torch.empty((most[1], k), dtype=torch.float32, device=device) if steps > 1 else table
    types = TYPES[grads[0].dtype], TYPES[weights[0].dtype]
    for first, last in calls:
        some = listed[first:last]
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
            rows=max(own.rows for own in some),
            columns=max(own.columns for own in some),
            matrices=last - first,
            tile=TILES["product"].rows,
            tail_tile=TILES["tail"].rows,
        )
        _step(work, some, decay, 2 if average else 1, steps, floors, types, aligned)


def _rows(
    lists: Sequence[Sequence[Tensor]],
    rates: Sequence[int],
    matrices: Sequence[SpikeMatrix],
    calls: Sequence[tuple[int, int]],
) -> tuple[list[list[int]], list[tuple[int, int, int]], bool]:
    """The table's rows; for every call the numbers of rows of U, the bases and W; and True if all are aligned."""
    addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in lists]
    sizes = [tensors[0].element_size() for tensors in lists]
    rows: list[list[int]] = []
    extents: list[tuple[int, int, int]] = []
    bits = 0
    for first, last in calls:
        row = column = part = 0
        for tensor, start, m, n, rank, basis, stride, record in matrices[first:last]:
            starts = (start, start, start, basis, record)
            own = [at[tensor] + begin * width for at, begin, width in zip(addresses, starts, sizes, strict=True)]
            bits |= own[0] | own[1] | own[2] | n
            rows.append([*own, rates[tensor], m, n, rank, stride, row, column, part])
            row, column, part = row + m, column + n, part + n * blocks_of(m, SPLIT)
        extents.append((row, column, part))
    return rows, extents, bits % 16 == 0


def _step(
    work: thin.Thin,
    matrices: Sequence[SpikeMatrix],
    decay: float,
    momentum: int,
    steps: int,
    floors: Sequence[float],
    types: tuple[Any, Any],
    aligned: bool,
) -> None:
    """Step the matrices of one call."""
    most_rows = max(own.rows for own in matrices)

    def run(name: str, kernel: Any, blocks: int, *args: Any) -> None:
        options = {**work.options, "ALIGNED": aligned, **TILES[name].of(work.k)}
        launch(kernel, (blocks, len(matrices)), work.u.device, work.table, *args, **options)

    for power in range(steps):
        blocks = blocks_of(most_rows, TILES["product"].rows)
        numbers = (decay, 1 - decay, types[0], momentum if power == 0 else 0, power > 0)
        run("product", kernels.product_kernel, blocks, work.found, work.scratch, work.u, work.energies, *numbers)
        work.orthonormalize()
        width = TILES["transposed"].columns
        blocks = max(blocks_of(own.columns, width) * blocks_of(own.rows, SPLIT) for own in matrices)
        run("transposed", kernels.transposed_kernel, blocks, work.found, work.u, work.w, SPLIT)
        is_last = power == steps - 1
        work.measure(tails=is_last)
        work.keep_basis(from_scratch=power > 0, to_scratch=not is_last)
    blocks = blocks_of(most_rows, TILES["tail"].rows)
    run("tail", kernels.tail_kernel, blocks, work.found, work.u, work.w, work.tails, work.tail_energies)
    work.shape(*floors)
    blocks = blocks_of(most_rows, TILES["update"].rows)
    thins = (work.u, work.w, work.factors, work.scales)
    run("update", kernels.update_kernel, blocks, work.numbers, work.found, *thins, types[1])
