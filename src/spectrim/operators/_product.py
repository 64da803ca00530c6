"""Fast float32 products on the CPU, by oneDNN.

torch multiplies float32 matrices on the CPU with the BLAS that it was built with. If that is MKL and the processor is
not Intel's, it has less than half of the speed of oneDNN, which is also part of torch. Both round alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._precision import float32_product, true_float32
from ._stack import reading_is_free

__all__ = ["multiply", "product"]

WORTH_IT = 2**18  # below so many multiplications, the call costs more than it gains
SKINNY = 64  # a result with fewer columns is computed as its transpose if A is then read along contiguous memory
_available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if _available else None


def product(A: Tensor, B: Tensor) -> Tensor:
    """A @ B in true float32 for matrices, or for stacks of the same leading dimensions.

    Args:
        A, B: (..., m, k) and (..., k, n), of one dtype.
    """
    if not _supported(A, B):
        return float32_product(A, B)
    with true_float32(A.device):
        return _on_host(A, B)


def multiply(A: Tensor, B: Tensor) -> Tensor:
    """:func:`product` within :func:`true_float32`, which a caller enters once for many products."""
    return _on_host(A, B) if _supported(A, B) else A @ B


def _on_host(A: Tensor, B: Tensor) -> Tensor:
    if A.ndim == 2 or A.shape[:-2] == (1,):
        return _host_product(A[0], B[0]).unsqueeze(0) if A.ndim == 3 else _host_product(A, B)
    pairs = zip(A.flatten(0, -3), B.flatten(0, -3), strict=True)
    return torch.stack([_host_product(a, b) for a, b in pairs]).view(*A.shape[:-1], B.shape[-1])


def _supported(A: Tensor, B: Tensor) -> bool:
    return (
        _linear is not None
        and A.dtype == B.dtype == torch.float32
        and A.shape[:-2] == B.shape[:-2]
        and A.shape[-2] * A.shape[-1] * B.shape[-1] >= WORTH_IT
        and reading_is_free(A)
        and reading_is_free(B)
        and not (
            torch.is_grad_enabled() and (A.requires_grad or B.requires_grad)
        )  # oneDNN's operator has no derivative
    )


def _host_product(A: Tensor, B: Tensor) -> Tensor:
    # The result has B's memory order, so that entry-wise operations on both are fast. If B has few columns, A is read
    # along contiguous memory.
    if B.stride(-1) != 1 or (B.shape[-1] < SKINNY and A.stride(-1) != 1):
        return _times_transposed(B.mT, A).mT
    return _times_transposed(A, B.mT)


def _times_transposed(A: Tensor, B: Tensor) -> Tensor:
    """A Bᵀ, row-major."""
    assert _linear is not None
    if not (B.is_contiguous() or B.mT.is_contiguous()):
        B = B.contiguous()  # for a strided B, oneDNN is a thousand times slower
    result: Tensor = _linear(A, B, None, "none", [], "")
    return result
