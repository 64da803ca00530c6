"""The whole step of Spectra by kernels, and the numerical limits that all forms of the step share.

The eager form is in :mod:`spectrim.operators.spike`.
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

EMPTY_TAIL = 1e-10  # a tail with a smaller share of the energy is rounding, and the spike is not shrunk to it
PLAIN_TAIL = 0.03  # a tail with more energy, relative to the spike's, is accurate as a difference of norms
DEAD_DIRECTION = 1e-6  # a direction with a smaller share of the norm is rounding
DEPENDENT = 1e-6  # a column is dependent if a smaller share of it is orthogonal to the columns before it
SHIFT = 1e-13  # added to a unit diagonal: far below float32's rounding, and above float64's
SMALLEST = 1e-300  # lower bound on the norms of columns that are divided by

#: The most directions of a spike that kernels take, since they hold k x k matrices in registers.
MOST_DIRECTIONS = 64


class SpikeMatrix(NamedTuple):
    """One logical matrix of a list of tensors, whose rows are contiguous in memory.

    Attributes:
        tensor: index of its tensor in the lists.
        start: index of its first entry in the tensor.
        rows, columns, rank: m, n and k.
        basis, stride: index of the first entry of its basis (n, k) in the tensor's basis, and the stride of rows there.
        record: index of its norm in the tensor's record.
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
    """Take the step M ← μM + G, O = shaped(M), X ← (1 − ηλ)X − η · rms · √(mn)/‖O‖ · O by kernels.

    Args:
        weights, grads: of one floating-point dtype each.
        buffers, bases, records: float32. All tensors are contiguous.
        matrices: the logical matrices, which cover all weights.
        lr, weight_decay: one for each weight.
        decay, average: the momentum's, see :func:`~.momentum.momentum`.
        steps: power steps.
        keep: factor on the record of a norm; the record is at least the norm.
        share: the norm in the update is at least this share of the record.
        floor: an update whose norm is not above this is zero.

    Returns:
        False if no kernel takes the tensors; nothing is changed then.
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
