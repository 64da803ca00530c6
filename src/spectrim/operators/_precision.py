"""Matrix products of full precision, whatever torch's global precision settings are.

Training scripts let torch multiply float32 matrices in TF32 or bfloat16, accumulate half-precision products in half
precision, or run under autocast. The operators' accuracy does not survive this, so products here change the settings
while they run and restore them. A compiler reads the settings when it generates code; compiled graphs therefore call
an opaque operator, which changes them at run time.

The settings are global to the process: products of other threads run in full precision meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

__all__ = ["float32_product", "float32_sum", "full_accumulation", "true_float32"]

BACKENDS = ("cuda", "mkldnn")
REDUCED = ("tf32", "bf16")
REDUCTIONS = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")


def float32_product(A: Tensor, B: Tensor) -> Tensor:
    """A @ B in true float32, or in float64 for float64.

    Args:
        A, B: (..., m, k) and (..., k, n), of one dtype and the same leading dimensions. Transposed views are not
            copied.
    """
    if torch.compiler.is_compiling():
        return A @ B if A.dtype == torch.float64 else torch.ops.spectrim.float32_product(A, B)
    return _multiply_float32(A, B)


def float32_sum(C: Tensor, A: Tensor, B: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """beta C + alpha A B in true float32, or in float64 for float64, of stacks (E, m, n), (E, m, k) and (E, k, n)."""
    if torch.compiler.is_compiling() and A.dtype == torch.float32:
        result: Tensor = torch.ops.spectrim.float32_sum(C, A, B, beta, alpha)
        return result
    return _sum_float32(C, A, B, beta, alpha)


def true_float32(device: torch.device) -> AbstractContextManager[None]:
    """A context in which products of float32 matrices are computed in float32, without autocast."""
    reduced = {backend: value for backend in BACKENDS if (value := _float32_precision(backend)) in REDUCED}
    cast = _casts(device)
    return _true_float32(device, reduced, cast) if reduced or cast else nullcontext()


@contextmanager
def _true_float32(device: torch.device, reduced: dict[str, str], cast: bool) -> Iterator[None]:
    # torch has two interfaces to these settings. The older one raises an error if they were changed by the newer one;
    # then only the newer one is used.
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:
        legacy = "highest"
    if legacy != "highest":
        torch.set_float32_matmul_precision("highest")
    for backend in reduced:
        if _float32_precision(backend) in REDUCED:
            _set_float32_precision(backend, "ieee")
    try:
        with _without_autocast(device, cast):
            yield
    finally:
        if legacy != "highest":
            torch.set_float32_matmul_precision(legacy)
        for backend, precision in reduced.items():
            if _float32_precision(backend) != precision:
                _set_float32_precision(backend, precision)


@contextmanager
def full_accumulation(device: torch.device) -> Iterator[None]:
    """A context in which products of half-precision matrices are accumulated in float32, without autocast."""
    settings = torch.backends.cuda.matmul
    reduced = {name: value for name in REDUCTIONS if (value := getattr(settings, name))}
    accumulation = settings.allow_fp16_accumulation
    for name in reduced:
        _set_reduction(name, False)
    if accumulation:
        settings.allow_fp16_accumulation = False
    try:
        with _without_autocast(device, _casts(device)):
            yield
    finally:
        for name, value in reduced.items():
            _set_reduction(name, value)
        if accumulation:
            settings.allow_fp16_accumulation = True


def _casts(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _without_autocast(device: torch.device, cast: bool) -> AbstractContextManager[None]:
    return torch.autocast(device.type, enabled=False) if cast else nullcontext()


def _float32_precision(backend: str) -> str:
    precision: str = getattr(torch.backends, backend).matmul.fp32_precision
    return precision


def _set_float32_precision(backend: str, precision: str) -> None:
    getattr(torch.backends, backend).matmul.fp32_precision = precision


def _set_reduction(name: str, allowed: bool) -> None:
    """Set one setting; keep its permission to split sums, which newer versions of torch store with it."""
    settings = torch.backends.cuda.matmul
    split = getattr(settings, f"{name}_split_k", None)
    setattr(settings, name, allowed if split is None else (allowed, split))


def _multiply_float32(A: Tensor, B: Tensor) -> Tensor:
    with true_float32(A.device):
        return A @ B


def _sum_float32(C: Tensor, A: Tensor, B: Tensor, beta: float, alpha: float) -> Tensor:
    with true_float32(A.device):
        return torch.baddbmm(C, A, B, beta=beta, alpha=alpha)


_float32_product = torch.library.custom_op("spectrim::float32_product", _multiply_float32, mutates_args=())
_float32_sum = torch.library.custom_op("spectrim::float32_sum", _sum_float32, mutates_args=())

_float32_product.register_fake(lambda A, B: A.new_empty((*A.shape[:-1], B.shape[-1])))
_float32_sum.register_fake(lambda C, A, B, beta, alpha: torch.empty_like(C))


def _keep_factors(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _derivative(ctx, gradient):  # type: ignore[no-untyped-def]
    A, B = ctx.saved_tensors
    return float32_product(gradient, B.mT), float32_product(A.mT, gradient)


def _keep_terms(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, A, B, ctx.beta, ctx.alpha = inputs
    ctx.save_for_backward(A, B)


def _derivative_of_sum(ctx, gradient):  # type: ignore[no-untyped-def]
    A, B = ctx.saved_tensors
    scaled = ctx.alpha * gradient
    return ctx.beta * gradient, float32_product(scaled, B.mT), float32_product(A.mT, scaled), None, None


_float32_product.register_autograd(_derivative, setup_context=_keep_factors)
_float32_sum.register_autograd(_derivative_of_sum, setup_context=_keep_terms)
