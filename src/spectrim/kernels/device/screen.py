"""The largest magnitude of every tensor and the mean root of every matrix in one pass, in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..costs import Cost, size
from ..runs import triples
from ..table import BLOCK, block_map, upload
from .common import entries, number, pointer, work_of
from .operators import addresses, aligned, launch, operator

__all__ = ["screen"]

#: The kernel's codes of dtypes, which one launch may mix.
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

#: Partial sums that a program adds at a time.
CHUNK = 1024


@triton.jit
def _block(
    source, offsets, left, largest_at, root_at, LARGEST: tl.constexpr, ROOTS: tl.constexpr, MASKED: tl.constexpr
):
    size = tl.abs(entries(source, offsets, left, MASKED))
    if LARGEST:
        # Magnitudes compare like their bits as integers; NaN is the largest.
        bits = size.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        tl.atomic_max(largest_at, tl.max(bits, axis=0), sem="relaxed")
    if ROOTS:
        tl.store(root_at, tl.sum(tl.sqrt(size), axis=0))


@triton.jit
def _any_dtype(
    table, count, tensor, begin, offsets, left, largest_at, root_at,
    LARGEST: tl.constexpr, ROOTS: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    code = tl.load(table + count + tensor)
    # Triton needs a different name for each pointer type.
    if code == 0:
        full = pointer(table, tensor, begin, tl.float32, ALIGNED)
        _block(full, offsets, left, largest_at, root_at, LARGEST, ROOTS, MASKED)
    elif code == 1:
        brain = pointer(table, tensor, begin, tl.bfloat16, ALIGNED)
        _block(brain, offsets, left, largest_at, root_at, LARGEST, ROOTS, MASKED)
    else:
        half = pointer(table, tensor, begin, tl.float16, ALIGNED)
        _block(half, offsets, left, largest_at, root_at, LARGEST, ROOTS, MASKED)


@triton.jit(do_not_specialize=["count"])
def _screen_kernel(
    table, blocks, count, largest, roots,
    LARGEST: tl.constexpr, ROOTS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, _matrix, begin, left = work_of(blocks, ALIGNED)
    offsets = tl.arange(0, BLOCK)
    largest_at = largest + tensor
    root_at = roots + tl.program_id(0)
    if left >= BLOCK:
        _any_dtype(table, count, tensor, begin, offsets, 0, largest_at, root_at, LARGEST, ROOTS, False, ALIGNED)
    else:
        _any_dtype(table, count, tensor, begin, offsets, left, largest_at, root_at, LARGEST, ROOTS, True, ALIGNED)


@triton.jit(do_not_specialize=["first"])
def _means_kernel(table, first, spans, roots, means, CHUNK: tl.constexpr):
    """The mean of a matrix from its partial sums, added in a fixed order."""
    matrix = tl.program_id(0)
    start = tl.load(spans + 2 * matrix)
    blocks = tl.load(spans + 2 * matrix + 1)
    offsets = tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK], tl.float32)
    for begin in range(0, blocks, CHUNK):
        total += tl.load(roots + start + begin + offsets, mask=begin + offsets < blocks, other=0.0)
    tl.store(means + matrix, tl.sum(total, axis=0) / number(table, first + matrix))


def _fake(
    tensors: list[Tensor], runs: list[int] | None, counts: list[int] | None, largest: bool, roots: bool
) -> tuple[Tensor, Tensor]:
    matrices = len(tensors) if runs is None else len(runs) // 3
    device = tensors[0].device
    return (
        torch.empty(len(tensors) if largest else 0, dtype=torch.float32, device=device),
        torch.empty(matrices if roots else 0, dtype=torch.float32, device=device),
    )


@operator(
    fake=_fake,
    cost=lambda tensors, runs, counts, largest, roots: Cost(2 + roots, size(tensors), {}),
)
def screen(
    tensors: list[Tensor], runs: list[int] | None, counts: list[int] | None, largest: bool, roots: bool
) -> tuple[Tensor, Tensor]:
    """:func:`~spectrim.kernels.magnitudes.magnitudes_and_roots` as an operator; unwanted results are empty."""
    device = tensors[0].device
    map_ = block_map([tensor.numel() for tensor in tensors], triples(runs), device, whole=largest)
    count = len(tensors)
    matrices = count if runs is None else len(runs) // 3
    if counts is None and roots:
        counts = [tensor.numel() for tensor in tensors] if runs is None else list(runs[2::3])
    rows = [addresses(tensors), [CODES[tensor.dtype] for tensor in tensors]]
    table = upload(device, rows, [[float(max(1, length)) for length in counts or ()]])
    # Magnitudes are compared as integers, and viewed as floats afterwards.
    magnitudes = torch.zeros(count, dtype=torch.int32, device=device)
    partial = torch.empty(map_.programs if roots else 0, dtype=torch.float32, device=device)
    means = torch.empty(matrices if roots else 0, dtype=torch.float32, device=device)
    constants = {"ALIGNED": map_.aligned and aligned(rows[:1]), "BLOCK": BLOCK, "num_warps": 8}
    launch(
        _screen_kernel,
        map_.programs,
        device,
        table,
        map_.blocks,
        count,
        magnitudes,
        partial,
        largest,
        roots,
        **constants,
    )
    if roots:
        launch(_means_kernel, matrices, device, table, 2 * count, map_.spans, partial, means, CHUNK=CHUNK, num_warps=4)
    return (magnitudes if largest else magnitudes[:0]).view(torch.float32), means
