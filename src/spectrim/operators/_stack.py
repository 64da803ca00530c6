"""Checks and conversions of the operators' arguments: stacks of matrices, working dtypes, one number per matrix.

Every operator takes (..., m, n): the last two dimensions are a matrix, the leading ones a stack of independent ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["as_matrices", "can_read", "energy", "entry_maximum", "per_matrix", "reading_is_free", "working_dtype"]


def working_dtype(X: Tensor) -> torch.dtype:
    """Float64 for float64, and float32 for every narrower floating-point type."""
    return torch.float64 if X.dtype == torch.float64 else torch.float32


def as_matrices(X: Tensor, name: str = "X") -> Tensor:
    """Check that X is a stack of real matrices and return it in its working precision (possibly X itself)."""
    if X.ndim < 2:
        raise ValueError(f"{name} has shape {tuple(X.shape)}: expected a matrix or a stack of matrices, (..., m, n)")
    if not X.is_floating_point():
        raise ValueError(f"{name} has dtype {X.dtype}: expected a real floating-point type")
    return X.to(working_dtype(X))


def per_matrix(value: float | Tensor, X: Tensor, name: str) -> Tensor:
    """One positive number per matrix of X, shaped to broadcast against X.

    A Python number is checked. A tensor must broadcast to X.shape[:-2]; its values are not checked, since reading them
    would make the host wait for the device.
    """
    if isinstance(value, Tensor):
        pairs = zip(reversed(value.shape), reversed(X.shape[:-2]), strict=False)
        if value.ndim > X.ndim - 2 or any(size not in (1, count) for size, count in pairs):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}: expected one that broadcasts to the stack's "
                f"shape {tuple(X.shape[:-2])}"
            )
        return value.to(device=X.device, dtype=X.dtype)[..., None, None]
    if not 0 < value < math.inf:  # a comparison, since a compiler can trace it for a number that changes
        raise ValueError(f"{name}={value}: expected a positive, finite number")
    largest = torch.finfo(X.dtype).max  # a larger threshold changes no matrix either
    return torch.full((1, 1), value if value < largest else largest, device=X.device, dtype=X.dtype)


def entry_maximum(X: Tensor) -> Tensor:
    """The largest |entry| of every matrix, as (..., 1, 1); 1 for a zero matrix, so that it can be a divisor."""
    largest: Tensor = torch.linalg.vector_norm(X, ord=math.inf, dim=(-2, -1), keepdim=True)
    return torch.where(largest == 0, 1.0, largest)


ENERGY_BLOCK = 2**16  # entries whose squares are summed in the working precision


def energy(X: Tensor) -> Tensor:
    """‖X‖_F² of every matrix, (...), in float64. Squares that overflow the working precision are summed in float64."""
    if reading_is_free(X) and (X.is_contiguous() or X.mT.is_contiguous()) and X.numel() > 0:
        # The CPU's BLAS sums squares at the speed of memory; torch's norms are far slower.
        rows = (X if X.is_contiguous() else X.mT).reshape(-1, X.shape[-2] * X.shape[-1])
        sums = [torch.stack([torch.dot(part, part) for part in row.split(ENERGY_BLOCK)]).double().sum() for row in rows]
        result = torch.stack(sums).reshape(X.shape[:-2])
        if bool(result.isfinite().all()) and bool((result > torch.finfo(X.dtype).tiny).all()):
            return result
    norm: Tensor = torch.linalg.vector_norm(X, dim=(-2, -1), dtype=torch.float64)
    return norm.square()


def reading_is_free(X: Tensor) -> bool:
    """True if the host can read a number of X without waiting: on the CPU, not while compiling, not a fake tensor."""
    return X.device.type == "cpu" and type(X) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()


def can_read(X: Tensor) -> bool:
    """True if the host can read a number of X, perhaps after a wait: not while compiling, no fake or meta tensor."""
    return X.device.type != "meta" and type(X) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
