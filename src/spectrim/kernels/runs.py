"""Runs: the logical matrices of a list of tensors, each a contiguous part of one tensor.

A stack of experts has a run for each expert, a fused QKV weight a run for each projection. Without runs, every tensor
is one matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Run", "check_per_matrix", "check_runs", "flat", "parts", "triples"]

#: (index of the tensor in its list, first entry in memory order, number of entries)
Run = tuple[int, int, int]


def check_runs(tensors: Sequence[Tensor], runs: Sequence[Run], *, whole: bool) -> None:
    """Check runs.

    Raises:
        ValueError: a tensor is not contiguous; runs overlap or exceed their tensors; or, with ``whole``, runs do not
            cover all entries.
    """
    for index, tensor in enumerate(tensors):
        if not tensor.is_contiguous():
            raise ValueError(f"tensor {index} of shape {tuple(tensor.shape)} has runs: expected it to be contiguous")
    covered = [0] * len(tensors)
    last = [0] * len(tensors)
    for run in sorted(runs):
        index, start, length = run
        if not 0 <= index < len(tensors) or length < 0 or start < 0 or start + length > tensors[index].numel():
            raise ValueError(f"run {run}: expected a part of one of {len(tensors)} tensors")
        if start < last[index]:
            raise ValueError(f"run {run} overlaps the run before it, which ends at entry {last[index]}")
        covered[index] += length
        last[index] = start + length
    if whole:
        for index, tensor in enumerate(tensors):
            if covered[index] != tensor.numel():
                raise ValueError(
                    f"runs cover {covered[index]} of {tensor.numel()} entries of tensor {index}: expected all"
                )


def check_per_matrix(name: str, vector: Tensor, tensors: Sequence[Tensor], runs: Sequence[Run] | None) -> None:
    """Check that a vector has one float32 number for each run, or for each tensor without runs.

    Raises:
        ValueError: the vector does not, or :func:`check_runs` fails; the runs must cover every tensor.
    """
    if runs is not None:
        check_runs(tensors, runs, whole=True)
    count = len(tensors if runs is None else runs)
    if vector.shape != (count,) or vector.dtype != torch.float32 or not vector.is_contiguous():
        raise ValueError(
            f"{name} is {vector.dtype} of shape {tuple(vector.shape)}: expected a float32 vector of {count}"
        )


def parts(tensors: Sequence[Tensor], runs: Sequence[Run] | None) -> list[Tensor]:
    """A view of every run as a vector; without runs, the tensors themselves."""
    if runs is None:
        return list(tensors)
    return [tensors[index].view(-1)[start : start + length] for index, start, length in runs]


def flat(runs: Sequence[Run] | None) -> list[int] | None:
    """Runs as one list of integers, which an operator can take."""
    return None if runs is None else [entry for run in runs for entry in run]


def triples(runs: Sequence[int] | None) -> list[Run] | None:
    """The inverse of :func:`flat`."""
    return None if runs is None else list(zip(runs[::3], runs[1::3], runs[2::3], strict=True))
