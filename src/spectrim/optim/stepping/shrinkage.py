"""Entry-wise shrinkage by a kernel, on the way of gradients into AdamW's one pass (arXiv 2605.27733)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from spectrim.kernels.choice import kernel_runs
from spectrim.kernels.magnitudes import mean_roots
from spectrim.kernels.runs import Run
from spectrim.operators import ShrinkForm
from spectrim.operators.shrink import HALF_MOMENT
from spectrim.optim.grouping.layout import sizes_of
from spectrim.optim.stepping.entries import Entry

__all__ = ["Shrinkage", "shrinkage_by_kernel"]


class Shrinkage(NamedTuple):
    """What a kernel shrinks gradients by: τ of every logical matrix, where these lie, and the form."""

    taus: Tensor
    runs: Sequence[Run] | None
    form: ShrinkForm


def shrinkage_by_kernel(entries: Sequence[Entry]) -> Shrinkage | None:
    """The scales of gradients whose entries AdamW's kernel is to shrink; None where it does not.

    Args:
        entries: of one flag and device, whose rules shrink alike, or not at all.

    Returns:
        None as well where a logical matrix is no run of memory.
    """
    shrink = entries[0].rule.shrink
    if shrink is None:
        return None
    grads = [entry.grad for entry in entries]
    state = [[entry.state[key] for entry in entries] for key in entries[0].rule.direction.keys]
    if not kernel_runs("mean_roots", grads, *state):
        return None
    runs: list[Run] = []
    for index, entry in enumerate(entries):
        lengths = _lengths(entry)
        if lengths is None:
            return None
        start = 0
        for length in lengths:
            runs.append((index, start, length))
            start += length
    roots = mean_roots(grads, runs=runs)
    return Shrinkage(roots.square_().mul_(shrink.factor / HALF_MOMENT), runs, shrink.form)


def _lengths(entry: Entry) -> list[int] | None:
    """The entries of each logical matrix, in the order of memory."""
    size = entry.parameter.numel()
    if entry.layout == "vector":
        return [size]
    if entry.split is not None:
        sizes, interleaved = sizes_of(entry.split)
        if interleaved or entry.layout not in ("matrix", "flatten"):
            return None
        return [rows * (size // sum(sizes)) for rows in sizes]
    experts = entry.parameter.shape[0] if entry.layout in ("stack", "transposed_stack") else 1
    return [size // experts] * experts
