"""Entry-wise shrinkage of gradients inside AdamW's kernel (arXiv 2605.27733)."""

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
    """Shrinkage as kernels take it: τ of every logical matrix, the matrices' runs of memory, and the form."""

    taus: Tensor
    runs: Sequence[Run] | None
    form: ShrinkForm


def shrinkage_by_kernel(entries: Sequence[Entry]) -> Shrinkage | None:
    """Compute the shrinkage that AdamW's kernel applies to gradients.

    Args:
        entries: of one skip flag and device, all with the same shrinkage or all without.

    Returns:
        None if the rules do not shrink, no kernel runs, or a logical matrix is not contiguous in memory.
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
    """The number of entries of each logical matrix, in memory order; None if a matrix is not contiguous."""
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
