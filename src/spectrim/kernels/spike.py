"""The whole step of Spectra in a few launches that read momentum where it lies, and what counts as rounding in one.

The eager form is the step's own path over stacks: :mod:`spectrim.operators.spike` has the formulas, in the same
precision and with these limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .choice import kernel_runs
from .lists import Found, Number, rates

__all__ = [
    "DEAD_DIRECTION",
    "DEPENDENT",
    "EMPTY_TAIL",
    "MOST_DIRECTIONS",
    "PLAIN_TAIL",
    "SHIFT",
    "SMALLEST",
    "SpikeMatrix",
    "spike_step",
]

EMPTY_TAIL = 1e-10  # a tail with less of the energy than this is rounding: nothing to shrink the spike to
PLAIN_TAIL = 0.03  # a tail of this much energy against the spike's is no small difference of large numbers
DEAD_DIRECTION = 1e-6  # a direction that carries less of the norm than this is rounding too
DEPENDENT = 1e-6  # a column of which less than this is left, once the ones before it are taken out, is rounding
SHIFT = 1e-13  # added to a unit diagonal: far below float32's rounding, and above float64's
SMALLEST = 1e-300  # divides a column of zeros

#: The most directions of a matrix that kernels take, for they hold k x k matrices in registers.
MOST_DIRECTIONS = 64


class SpikeMatrix(NamedTuple):
    """One logical matrix of a list of tensors, a run of rows in memory.

    Attributes:
        tensor: its tensor's place in the lists.
        start: its first entry there.
        rows, columns, rank: m, n and k.
        basis, stride: the first entry of its basis (n, k) in its tensor's, and from row to row there.
        record: its norm's place in its tensor's record.
    """

    tensor: int
    start: int
    rows: int
    columns: int
    rank: int
    basis: int
    stride: int
    record: int


def spike_step(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    bases: Sequence[Tensor],
    records: Sequence[Tensor],
    matrices: Sequence[SpikeMatrix],
    *,
    lr: Sequence[Number],
    weight_decay: Sequence[float],
    decay: float,
    average: bool,
    steps: int,
    rms: float,
    keep: float,
    share: float,
    floor: float,
    found: Found = None,
) -> bool:
    """Take the step M ← μM + G, O = shaped(M), X ← (1 − ηλ)X − η · rms · √(mn)/‖O‖ · O, if a kernel is to; else False.

    Args:
        weights, grads: of one floating-point dtype each; buffers, bases, records: float32. All contiguous.
        matrices: which together are all of the weights.
        lr, weight_decay: for each weight.
        decay, average: of the momentum; see :func:`~.momentum.momentum`.
        steps: power steps.
        keep, share, floor: a norm's record is multiplied by ``keep`` and is no less than the norm; the norm counts as
            at least ``share`` of the record, and an update whose norm is not above ``floor`` as zero.
    """
    state = (buffers, bases, records)
    if max(matrix.rank for matrix in matrices) > MOST_DIRECTIONS:
        return False
    if not all(tensor.dtype == torch.float32 and tensor.is_contiguous() for some in state for tensor in some):
        return False
    if not all(tensor.is_contiguous() for some in (weights, grads) for tensor in some):
        return False
    if len({weight.dtype for weight in weights}) > 1 or len({grad.dtype for grad in grads}) > 1:
        return False
    if not kernel_runs("spike_step", weights, grads, buffers, scalars=[one for one in lr if isinstance(one, Tensor)]):
        return False
    from .device import spike as device

    numbers = [entry for matrix in matrices for entry in matrix]
    lists = (list(weights), list(grads), list(buffers), list(bases), list(records))
    options = (decay, average, steps, [rms, keep, share, floor], found)
    device.spike_step(*lists, *rates(lr), list(weight_decay), numbers, *options)
    return True
