"""Passes over the entries of tensors: sums, Adam with shrinkage, momentum, and the update itself.

Each function works on tensors that :func:`~spectrim.native.library.serves` accepts together; its callers ask first,
and have an eager form beside it that says the same in torch's words.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float

import torch
from torch import Tensor

from .library import addresses, library, written

__all__ = ["adam_direction", "adam_step", "apply_update", "momentum_step", "sum_roots", "sum_squares"]

FORMS = {"none": 0, "redescending": 1, "monotone": 2, "hard": 3}


class _Adam(ctypes.Structure):
    """``struct adam`` of entries.c."""

    _fields_ = [
        (name, c_float)
        for name in (
            *("sign", "tau", "over_tau"),
            *("beta1", "rest1", "beta2", "rest2"),
            *("correction1", "correction2", "eps"),
            *("keep", "lr"),
        )
    ]


def sum_squares(x: Tensor) -> float:
    """The sum of squares in float64, where no finite float32 entry overflows."""
    partial = _partial_sums(x)
    result: float = library().sum_squares(torch.get_num_threads(), x.data_ptr(), x.numel(), partial.data_ptr())
    return result


def sum_roots(x: Tensor) -> float:
    """The sum of √|x|, in float64 between blocks."""
    partial = _partial_sums(x)
    result: float = library().sum_roots(torch.get_num_threads(), x.data_ptr(), x.numel(), partial.data_ptr())
    return result


def adam_step(
    x: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: float,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    tau: float,
    form: str,
) -> None:
    """AdamW on a gradient whose entries are shrunk against ``tau`` on the way; in place."""
    numbers = _numbers(step, beta1, beta2, eps, sign=-1.0 if maximize else 1.0)
    numbers.keep, numbers.lr = 1 - lr * weight_decay, lr
    if tau < torch.finfo(torch.float32).tiny:  # whose inverse there is none of
        form = "hard"
    numbers.tau, numbers.over_tau = tau, 0.0 if form == "hard" else 1 / tau
    pointers = addresses(x, grad, exp_avg, exp_avg_sq)
    library().adam_step(torch.get_num_threads(), *pointers, x.numel(), FORMS[form], ctypes.byref(numbers))
    written(x, exp_avg, exp_avg_sq)


def adam_direction(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: float, *, beta1: float, beta2: float, eps: float
) -> Tensor:
    """The bias-corrected Adam direction, a new tensor; updates both moments in place."""
    numbers = _numbers(step, beta1, beta2, eps)
    out = torch.empty_like(grad)
    pointers = addresses(out, grad, exp_avg, exp_avg_sq)
    library().adam_direction(torch.get_num_threads(), *pointers, grad.numel(), ctypes.byref(numbers))
    written(exp_avg, exp_avg_sq)
    return out


def momentum_step(
    grad: Tensor, buffer: Tensor, *, decay: float, averages: bool = False, nesterov: bool = False, sign: bool = False
) -> Tensor:
    """Momentum as a sum, or as an average; updates the buffer in place, and returns it where it is the direction."""
    out = torch.empty_like(grad) if nesterov or sign else None
    place = None if out is None else out.data_ptr()
    pointers = addresses(grad, buffer)
    library().momentum_step(
        torch.get_num_threads(), place, *pointers, grad.numel(), decay, int(averages), int(nesterov), int(sign)
    )
    written(buffer)
    return buffer if out is None else out


def apply_update(x: Tensor, update: Tensor, *, keep: float, step: float) -> None:
    """x ← keep · x − step · update, in place."""
    library().apply_update(torch.get_num_threads(), *addresses(x, update), x.numel(), keep, step)
    written(x)


def _numbers(step: float, beta1: float, beta2: float, eps: float, sign: float = 1.0) -> _Adam:
    return _Adam(
        sign=sign,
        beta1=beta1,
        rest1=1 - beta1,
        beta2=beta2,
        rest2=1 - beta2,
        correction1=1 / (1 - beta1**step),
        correction2=1 / (1 - beta2**step) ** 0.5,
        eps=eps,
    )


def _partial_sums(x: Tensor) -> Tensor:
    return torch.empty(library().partial_sums(x.numel()), dtype=torch.float64)
