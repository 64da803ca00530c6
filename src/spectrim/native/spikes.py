"""Spectra's matrices: the spike followed and shaped with one look at M, and the update that never forms O."""

from __future__ import annotations

import ctypes
import threading
from ctypes import c_double
from typing import NamedTuple

import torch
from torch import Tensor

from .library import library, written

__all__ = ["MOST_COLUMNS", "Followed", "Limits", "apply_low_rank", "follow_spike"]

MOST_COLUMNS = 64
APART = 16  # by which rows of right' are longer than they need: see apply_low_rank of spike.c
_rooms = threading.local()
_DONE, _TAIL_UNKNOWN, _NOT_SERVED = range(3)


class Limits(ctypes.Structure):
    """``struct limits`` of spike.c: the caller's constants, and how much a rounding error may grow."""

    _fields_ = [(name, c_double) for name in ("plain_tail", "empty_tail", "dead_direction", "most_amplified")]


class Followed(NamedTuple):
    """U (m, k), W (n, k) and V (n, k) after a power step; and right (n, k) and the norm of M + U rightᵀ, or None where
    the tail has to be formed to tell them."""

    U: Tensor
    W: Tensor
    V: Tensor
    right: Tensor | None
    norm: Tensor | None


def follow_spike(M: Tensor, V: Tensor, limits: Limits) -> Followed | None:
    """One power step from V, and the spike shrunk; None where float32 would not be accurate, or numbers are extreme.

    Args:
        M: (m, n), by rows. V: (n, k), k <= MOST_COLUMNS. Neither is written to.
    """
    (m, n), k = M.shape, V.shape[-1]
    native = library()
    basis = V.clone(memory_format=torch.contiguous_format)
    U, W, norm = M.new_empty(m, k), M.new_empty(n, k), M.new_empty(())
    right = M.new_empty(k, n + APART)[:, :n]
    floats = _room("floats", native.spike_floats(m, n, k), torch.float32)
    doubles = _room("doubles", native.spike_doubles(m, k), torch.float64)
    places = [tensor.data_ptr() for tensor in (M, basis, U, W, right)]
    outcome = native.follow_spike(
        torch.get_num_threads(),
        *places,
        right.stride(0),
        norm.data_ptr(),
        m,
        n,
        k,
        floats.data_ptr(),
        doubles.data_ptr(),
        ctypes.byref(limits),
    )
    if outcome == _NOT_SERVED:
        return None
    return Followed(U, W, basis, *((right.mT, norm) if outcome == _DONE else (None, None)))


def _room(name: str, size: int, dtype: torch.dtype) -> Tensor:
    """A tensor to work in, kept by each thread: about a megabyte, which would be slow to ask for anew every time."""
    room: Tensor | None = getattr(_rooms, name, None)
    if room is None or room.numel() < size:
        room = torch.empty(size, dtype=dtype)
        setattr(_rooms, name, room)
    return room


def apply_low_rank(X: Tensor, M: Tensor, left: Tensor, right: Tensor, *, keep: float, step: float) -> None:
    """X ← keep · X − step · (M + left rightᵀ), in place, for X and M (m, n) by rows and right (n, k) by columns."""
    (m, n), k = X.shape, left.shape[-1]
    places = [tensor.data_ptr() for tensor in (X, M, left, right)]
    library().apply_low_rank(torch.get_num_threads(), *places, right.stride(1), m, n, k, keep, step)
    written(X)
