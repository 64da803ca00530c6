"""Products of stacks of float16 matrices, summed in float32 and rounded once; or of float32 ones, in true float32.

In plain calls the caller holds :func:`arithmetic` around all of them. A compiler, which would not keep the switches
that it sets, is given opaque operators that set them at run time. On the CPU, where torch's own float16 products take
thirty times as long, the operands are widened: the same numbers, for tests and rehearsals.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from spectrim.kernels.choice import switched_on
from spectrim.kernels.symmetric import symmetric_product as by_halves

from ._precision import full_accumulation, true_float32

__all__ = ["arithmetic", "half_product", "product_added", "square_plus", "symmetric_product"]


def arithmetic(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """The context in which products of this dtype are as exact as they should be; nothing while compiling."""
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
    """C + A @ B, rounded once. Uses up C."""
    if torch.compiler.is_compiling() or A.device.type == "cpu":
        result: Tensor = torch.ops.spectrim.half_baddbmm(C, A, B)
        return result
    return C.baddbmm_(A, B)


def symmetric_product(A: Tensor, B: Tensor, *, plus: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """A @ B where the result is known to be symmetric: B is Aᵀ, or both are polynomials in one symmetric matrix.

    Args:
        A, B: (E, m, k) and (E, k, m).
        plus: (E, m, m), a symmetric summand, which is used up.
        out: (E, m, m), for the result where there is no summand.
    """
    if _by_halves(A):
        found: Tensor = by_halves(A, None if _is_gram(A, B) else B, C=plus)
        return found if out is None else out.copy_(found)
    if plus is not None:
        return product_added(plus, A, B)
    if out is None:
        return half_product(A, B)
    if torch.compiler.is_compiling() or A.device.type == "cpu":
        return out.copy_(half_product(A, B))
    return torch.bmm(A, B, out=out)


def square_plus(R: Tensor, beta: Tensor, alpha: Tensor, square: Tensor | None = None) -> Tensor:
    """R² + βR + αI of symmetric matrices.

    Args:
        R: (E, m, m).
        beta, alpha: (E, 1, 1).
        square: R², which is used up, where it is known.
    """
    if square is None and _by_halves(R):
        numbers = (beta.reshape(-1).float(), alpha.reshape(-1).float())
        return by_halves(R, R, C=R, beta=numbers[0], gamma=numbers[1])
    Q = (symmetric_product(R, R) if square is None else square).addcmul_(R, beta)
    Q.diagonal(dim1=-2, dim2=-1).add_(alpha[..., 0])
    return Q


def _by_halves(A: Tensor) -> bool:
    """True if a kernel is to compute symmetric products by halves."""
    half = A.dtype in (torch.float16, torch.bfloat16)
    return half and not torch.compiler.is_compiling() and switched_on("symmetric_product", A.device)


def _is_gram(A: Tensor, B: Tensor) -> bool:
    """True if B is A's transposed view."""
    turned = A.stride(-1) == B.stride(-2) and A.stride(-2) == B.stride(-1) and A.shape[-1] == B.shape[-2]
    alias: bool = torch._C._is_alias_of(A, B)  # type: ignore[attr-defined]
    return turned and A.stride(-1) != A.stride(-2) and alias


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
