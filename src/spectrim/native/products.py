"""Products that know their result is symmetric: Gram matrices, and sums of inverses of shifted ones.

They work on single matrices that :func:`~spectrim.native.library.serves` accepts; results do not depend on the number
of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .library import library

__all__ = ["add_resolvents_", "gram_matrix"]

#: Threads up to which each works on an inverse of its own; of more, all work on one, for the sake of memory.
THREADS_APART = 4


def gram_matrix(X: Tensor, c: float, taken: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Z Zᵀ for Z = (X − V S)/c on and below the diagonal; above it there may be anything.

    Args:
        X: (m, n), by rows or by columns.
        taken: V (m, r) and S (r, n), for r of at most a few.
    """
    m, n = X.shape
    native = library()
    side = -(-m // 64) * 64
    out, packed = X.new_empty(side, side), X.new_empty(native.gram_floats(m))
    rank = 0
    places: list[int | None] = [None, None]
    if taken is not None:
        V, S = taken
        rank = V.shape[-1]
        wide, S = X.new_zeros(rank, side), S.contiguous()
        wide[:, :m] = V.mT
        places = [wide.data_ptr(), S.data_ptr()]
    native.gram_matrix(
        torch.get_num_threads(),
        X.data_ptr(),
        *X.stride(),
        m,
        n,
        1 / c,
        *places,
        rank,
        out.data_ptr(),
        packed.data_ptr(),
    )
    return out if side == m else out[:m, :m].contiguous()


def add_resolvents_(
    root: Tensor, gram: Tensor, weights: Sequence[float], shifts: Sequence[float]
) -> tuple[float, float]:
    """Add Σⱼ wⱼ (G + sⱼ)^(-1) to ``root`` on and below the diagonal; G is read there too.

    Returns:
        Of the first inverse R its norm ‖R‖_F, and the trace of G R.
    """
    native, count, threads = library(), len(weights), torch.get_num_threads()
    n = gram.shape[-1]
    together = min(count, threads) if threads <= THREADS_APART else 1
    work = gram.new_empty(together * native.inverse_floats(n))
    numbers = torch.tensor([*weights, *shifts], dtype=torch.float64)
    sizes = torch.empty(2, dtype=torch.float64)
    native.add_resolvents(
        threads,
        gram.data_ptr(),
        root.data_ptr(),
        n,
        numbers.data_ptr(),
        numbers[count:].data_ptr(),
        count,
        together,
        work.data_ptr(),
        sizes.data_ptr(),
    )
    squares, inner = sizes.tolist()
    return math.sqrt(squares), inner
