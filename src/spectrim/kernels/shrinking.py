"""Entry-wise shrinkage ψ(y) over lists, with one threshold τ for each logical matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from .runs import Run, parts

__all__ = ["FORMS", "ShrinkForm", "shrunk", "shrunk_entries"]

ShrinkForm = Literal["redescending", "monotone", "hard"]

#: The forms; kernels number them from 1 in this order.
FORMS: tuple[ShrinkForm, ...] = get_args(ShrinkForm)


def shrunk_entries(y: Tensor, tau: Tensor, form: ShrinkForm) -> Tensor:
    """ψ(y), entry by entry: y / (1 + (y/τ)²), or y / √(1 + (y/τ)²), or y clamped to [−τ, τ]; zero if τ is.

    Args:
        y: float32 or float64.
        tau: τ ≥ 0, a scalar or broadcasting.
    """
    if form == "hard":
        return y.clamp(-tau, tau)
    # τ / √(τ² + y²) without overflow, and zero for zero over zero.
    share = tau / torch.hypot(tau, y).clamp_min(torch.finfo(y.dtype).tiny)
    return y * (share.square() if form == "redescending" else share)


def shrunk(
    grads: Sequence[Tensor], taus: Tensor | None, runs: Sequence[Run] | None, form: ShrinkForm, dtype: torch.dtype
) -> Sequence[Tensor]:
    """ψ of every gradient in a given dtype, as new tensors; without ``taus``, the gradients themselves.

    Args:
        taus: (R,), τ of every run, or of every tensor without runs.
        runs: must cover every tensor.
    """
    if taus is None:
        return grads
    if form not in FORMS:
        raise ValueError(f"form={form!r}: expected one of {', '.join(map(repr, FORMS))}")
    result = [torch.empty_like(grad, dtype=dtype) for grad in grads]
    for source, target, tau in zip(parts(grads, runs), parts(result, runs), taus.unbind(), strict=True):
        target.copy_(shrunk_entries(source.to(dtype), tau.to(dtype), form))
    return result
