"""Products of stacks of matrices by kernels, which do half of the work if the result is symmetric.

Call them for stacks with :func:`takes_halves`; the eager forms are in :mod:`spectrim.operators._stack_product`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .choice import switched_on

__all__ = ["gram_product", "product_less", "symmetric_product", "takes_halves"]

HALVES = (torch.float16, torch.bfloat16)

#: Kernels' offsets in a matrix have 32 bits.
MOST_ENTRIES = 2**31


def symmetric_product(
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 1.0,
    gamma: float | Tensor = 0.0,
) -> Tensor:
    """α A Aᵀ + β C + γ I, or α A B + β C + γ I of symmetric matrices A and B that commute, for a stack of matrices.

    Args:
        A: (E, m, k), with any strides.
        B: None, or (E, m, m), the shape that A must have too. The entries on and below the diagonal are computed, so
            the result is exactly symmetric.
        C: None, or (E, m, m), symmetric.
        alpha, beta, gamma: numbers, or float32 vectors (E,) on the device.

    Returns:
        (E, m, m), contiguous, in A's dtype. Half precision is accumulated in float32.
    """
    from .device import symmetric as device

    numbers = [1.0 if isinstance(value, Tensor) else float(value) for value in (alpha, beta, gamma)]
    vectors = [value.contiguous() if isinstance(value, Tensor) else None for value in (alpha, beta, gamma)]
    return device.symmetric_product(A, B, C, *vectors, *numbers)  # type: ignore[no-any-return]


def gram_product(A: Tensor, out: Tensor, gamma: Tensor | None = None) -> None:
    """out ← A Aᵀ + γ I.

    Args:
        A: (E, m, k), with any strides.
        out: (E, m, m) of contiguous matrices.
        gamma: a float32 vector (E,), contiguous, or None for zero.
    """
    from .device import symmetric as device

    device.gram_product(A, gamma, out)


def product_less(S: Tensor, Y: Tensor, X: Tensor, factors: Tensor) -> Tensor:
    """S Y − f X, summed in float32 and rounded once.

    Args:
        S: (E, m, m), of contiguous matrices.
        Y: (E, m, n), in S's dtype, with any strides.
        X: (E, m, n), float32, with any strides.
        factors: f, a vector (E,), contiguous, float32 or float64.
    """
    from .device import symmetric as device

    return device.product_less(S, Y, X, factors)  # type: ignore[no-any-return]


def takes_halves(*matrices: Tensor | None) -> bool:
    """True if the kernels run: for matrices in half precision, small enough for 32-bit offsets."""
    first = matrices[0]
    assert first is not None
    if first.dtype not in HALVES or not switched_on("symmetric_product", first.device):
        return False
    for matrix in matrices:
        if matrix is not None:
            _, m, n = matrix.shape
            _, row, column = matrix.stride()
            if m * row + n * column >= MOST_ENTRIES:
                return False
    return True
