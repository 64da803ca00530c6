"""Matrix products at the speed of the machine.

torch sends float32 products on the host to the BLAS that it was built with. Where that is MKL on another maker's
processor it runs at less than half of what oneDNN reaches, which torch carries as well and its compiler uses for linear
layers. Both round alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._precision import float32_product, true_float32
from ._stack import reading_is_free

__all__ = ["multiply", "product"]

WORTH_IT = 2**18  # multiplications below which the call costs more than it gains
SKINNY = 64  # a result with fewer columns is computed as its transpose where that lets a factor be read along its rows
_available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if _available else None


def product(A: Tensor, B: Tensor) -> Tensor:
    """A @ B in true float32 for matrices, or for stacks of the same leading dimensions.

    Args:
        A, B: (..., m, k) and (..., k, n), of one dtype.
    """
    if not _served(A, B):
        return float32_product(A, B)
    with true_float32(A.device):
        return _on_host(A, B)


def multiply(A: Tensor, B: Tensor) -> Tensor:
    """:func:`product` on the host for a caller that holds :func:`true_float32` around many of them."""
    return _on_host(A, B) if _served(A, B) else A @ B


def _on_host(A: Tensor, B: Tensor) -> Tensor:
    if A.ndim == 2 or A.shape[:-2] == (1,):
        return _host_product(A[0], B[0]).unsqueeze(0) if A.ndim == 3 else _host_product(A, B)
    pairs = zip(A.flatten(0, -3), B.flatten(0, -3), strict=True)
    return torch.stack([_host_product(a, b) for a, b in pairs]).view(*A.shape[:-1], B.shape[-1])


def _served(A: Tensor, B: Tensor) -> bool:
    return (
        _linear is not None
        and A.dtype == B.dtype == torch.float32
        and A.shape[:-2] == B.shape[:-2]
        and A.shape[-2] * A.shape[-1] * B.shape[-1] >= WORTH_IT
        and reading_is_free(A)
        and reading_is_free(B)
        and not (torch.is_grad_enabled() and (A.requires_grad or B.requires_grad))  # it has no derivative
    )


def _host_product(A: Tensor, B: Tensor) -> Tensor:
    # The product lies in memory as B does, by columns or by rows, so that it meets B in passes over both; and a factor
    # that meets few columns is read along its rows.
    if B.stride(-1) != 1 or (B.shape[-1] < SKINNY and A.stride(-1) != 1):
        return _times_transposed(B.mT, A).mT
    return _times_transposed(A, B.mT)


def _times_transposed(A: Tensor, B: Tensor) -> Tensor:
    """A Bᵀ, by rows."""
    assert _linear is not None
    if not (B.is_contiguous() or B.mT.is_contiguous()):
        B = B.contiguous()  # with a strided second factor oneDNN falls back to a loop, a thousand times slower
    result: Tensor = _linear(A, B, None, "none", [], "")
    return result
