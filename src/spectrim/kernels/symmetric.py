"""Symmetric products over stacks of matrices, α X Xᵀ + β C + γ I, for which kernels do half of the work."""

from __future__ import annotations

import torch
from torch import Tensor

from .choice import switched_on

__all__ = ["gram_product", "product_by_halves", "product_less", "symmetric_product", "takes_halves"]

HALVES = (torch.float16, torch.bfloat16)

#: Kernels' offsets in a matrix have 32 bits.
MOST_ENTRIES = 2**31


def symmetric_product(
    A: Tensor,
    B: Tensor | None = None,
    *,
    C: Tensor | None = None,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 1.0,
    gamma: float | Tensor = 0.0,
) -> Tensor:
    """α A Aᵀ + β C + γ I, or α A B + β C + γ I of symmetric matrices A and B that commute, for a stack of matrices.

    Args:
        A: (E, m, k), with any strides.
        B: None, or (E, m, m), the shape that A must have too. The kernel computes the entries on and below the
            diagonal, so its result is exactly symmetric; the eager form's is as symmetric as A B.
        C: None, or (E, m, m), symmetric.
        alpha, beta, gamma: numbers, or float32 vectors (E,) on the device.

    Returns:
        (E, m, m), contiguous, in A's dtype. Half precision is accumulated in float32.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    count, size = A.shape[0], A.shape[1]
    for name, matrix in (("B", B), ("C", C)):
        if matrix is not None and (matrix.shape != (count, size, size) or matrix.dtype != A.dtype):
            raise ValueError(
                f"{name} is {matrix.dtype} of shape {tuple(matrix.shape)}: expected {A.dtype} of {(count, size, size)}"
            )
    if B is not None and A.shape != B.shape:
        raise ValueError(f"A has shape {tuple(A.shape)}: expected that of B, {tuple(B.shape)}")
    if takes_halves(A, B, C):
        return product_by_halves(A, B, C, alpha, beta, gamma)
    right = A.mT if B is None else B
    if C is not None and not isinstance(alpha, Tensor) and not isinstance(beta, Tensor):
        product = torch.baddbmm(C, A, right, alpha=alpha, beta=beta)
    else:
        product = torch.bmm(A, right)
        if isinstance(alpha, Tensor) or alpha != 1:
            product.mul_(_by_matrix(alpha))
        if C is not None:
            product.add_(C * _by_matrix(beta))
    if isinstance(gamma, Tensor) or gamma != 0:
        product.diagonal(dim1=-2, dim2=-1).add_(gamma.view(-1, 1) if isinstance(gamma, Tensor) else gamma)
    return product


def product_by_halves(
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None = None,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 1.0,
    gamma: float | Tensor = 0.0,
) -> Tensor:
    """:func:`symmetric_product` by the kernel, for stacks with :func:`takes_halves`."""
    from .device import symmetric as device

    numbers = [1.0 if isinstance(value, Tensor) else float(value) for value in (alpha, beta, gamma)]
    vectors = [value.contiguous() if isinstance(value, Tensor) else None for value in (alpha, beta, gamma)]
    return device.symmetric_product(A, B, C, *vectors, *numbers)  # type: ignore[no-any-return]


def gram_product(A: Tensor, out: Tensor, gamma: Tensor | None = None) -> None:
    """out ← A Aᵀ + γ I by the kernel, for stacks with :func:`takes_halves`.

    Args:
        A: (E, m, k), with any strides.
        out: (E, m, m) of contiguous matrices.
        gamma: a float32 vector (E,), contiguous, or None for zero.
    """
    from .device import symmetric as device

    device.gram_product(A, gamma, out)


def product_less(S: Tensor, Y: Tensor, X: Tensor, factors: Tensor) -> Tensor:
    """S Y − f X by the kernel, summed in float32 and rounded once, for stacks with :func:`takes_halves`.

    Args:
        S: (E, m, m), of contiguous matrices.
        Y: (E, m, n), in S's dtype, with any strides.
        X: (E, m, n), float32, with any strides.
        factors: f, a vector (E,), contiguous, float32 or float64.
    """
    from .device import symmetric as device

    return device.product_less(S, Y, X, factors)  # type: ignore[no-any-return]


def _by_matrix(value: float | Tensor) -> float | Tensor:
    return value.view(-1, 1, 1) if isinstance(value, Tensor) else value


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
