"""Products of stacks of float16 matrices, accumulated in float32 and rounded once; or of float32, in true float32.

Callers enter :func:`arithmetic` once for many products. Compiled graphs call opaque operators, which change torch's
precision settings at run time. On the CPU, torch's float16 products are thirty times slower than float32, so operands
are converted to float32; the results are the same.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from spectrim.kernels import symmetric as kernels

from ._precision import full_accumulation, true_float32

__all__ = [
    "arithmetic",
    "by_kernel",
    "gram",
    "half_product",
    "product_added",
    "square_plus",
    "square_plus_scaled",
    "symmetric_product",
]


#: From this side on, a kernel that computes half of a symmetric product is faster than torch, which computes all of it.
#: On an H200, the kernel took twice as long at 512; at 768 it saved the time of torch's additional sums and shifts.
LEAST_SIDE = 640


def arithmetic(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """A context of full precision for products of this dtype; no effect while compiling."""
    if torch.compiler.is_compiling():
        return nullcontext()
    return true_float32(device) if dtype == torch.float32 else full_accumulation(device)


def half_product(A: Tensor, B: Tensor) -> Tensor:
    """A @ B for stacks (E, m, k) and (E, k, n)."""
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.spectrim.half_bmm(A, B)
        return result
    return _multiply(A, B)


def product_added(C: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """C + A @ B, rounded once. May overwrite C."""
    if torch.compiler.is_compiling() or A.device.type == "cpu":
        result: Tensor = torch.ops.spectrim.half_baddbmm(C, A, B)
        return result
    return C.baddbmm_(A, B)


def symmetric_product(A: Tensor, B: Tensor) -> Tensor:
    """A @ B, which is symmetric, of commuting symmetric matrices (E, m, m), such as polynomials in one matrix."""
    return kernels.symmetric_product(A, B) if by_kernel(A, B) else half_product(A, B)


def gram(A: Tensor, out: Tensor, plus: Tensor | None = None) -> None:
    """out ← A Aᵀ + plus I, for A (E, m, k) of any strides, and plus (E,)."""
    if by_kernel(A):
        kernels.gram_product(A, out, plus)
        return
    if torch.compiler.is_compiling() or A.device.type == "cpu":
        out.copy_(half_product(A, A.mT))
    else:
        torch.bmm(A, A.mT, out=out)
    if plus is not None:
        out.diagonal(dim1=-2, dim2=-1).add_(plus[:, None])


def square_plus_scaled(B: Tensor, R: Tensor, factor: Tensor) -> Tensor:
    """(B² + R) times a factor (E,) per matrix. May overwrite R."""
    if by_kernel(B, R):
        return kernels.symmetric_product(B, B, R, factor, factor)
    return product_added(R, B, B).mul_(factor.view(-1, 1, 1))


def square_plus(R: Tensor, beta: Tensor, alpha: Tensor, square: Tensor | None = None) -> Tensor:
    """R² + βR + αI of symmetric matrices.

    Args:
        R: (E, m, m).
        beta, alpha: (E,).
        square: R² if it is known; it is overwritten.
    """
    if square is None and by_kernel(R):
        return kernels.symmetric_product(R, R, R, 1.0, beta, alpha)
    Q = (symmetric_product(R, R) if square is None else square).addcmul_(R, beta.view(-1, 1, 1))
    Q.diagonal(dim1=-2, dim2=-1).add_(alpha[:, None])
    return Q


def by_kernel(*matrices: Tensor) -> bool:
    """True if kernels compute products of these stacks. Never while compiling, where they gain nothing."""
    large = matrices[0].shape[1] >= LEAST_SIDE
    return large and not torch.compiler.is_compiling() and kernels.takes_halves(*matrices)


def _multiply(A: Tensor, B: Tensor) -> Tensor:
    if A.device.type == "cpu":
        return torch.bmm(A.float(), B.float()).to(A.dtype)
    return torch.bmm(A, B)


def _guarded_bmm(A: Tensor, B: Tensor) -> Tensor:
    with arithmetic(A.device, A.dtype):
        return _multiply(A, B)


def _guarded_baddbmm(C: Tensor, A: Tensor, B: Tensor) -> Tensor:
    if A.device.type == "cpu":
        return torch.baddbmm(C.float(), A.float(), B.float()).to(C.dtype)
    with arithmetic(A.device, A.dtype):
        return torch.baddbmm(C, A, B)


torch.library.custom_op("spectrim::half_bmm", _guarded_bmm, mutates_args=()).register_fake(
    lambda A, B: A.new_empty(A.shape[0], A.shape[1], B.shape[2])
)
torch.library.custom_op("spectrim::half_baddbmm", _guarded_baddbmm, mutates_args=()).register_fake(
    lambda C, A, B: C.new_empty(C.shape)
)
