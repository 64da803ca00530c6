"""Base directions: what an optimizer would subtract if it left the spectrum alone.

Each is a pure function of tensors that works entry by entry, so it runs on a shard as on the whole matrix. A
:class:`Direction` says which state a function needs and how it takes its numbers from a param group; recipes name one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectrim.native.entries import adam_direction, momentum_step
from spectrim.native.library import serves

__all__ = [
    "ADAM",
    "ADEMAMIX",
    "AVERAGE",
    "MOMENTUM",
    "SIGN",
    "Direction",
    "adam",
    "ademamix",
    "average",
    "fused_adam",
    "fused_kernel_serves",
    "momentum",
    "sign",
]

Number = float | Tensor


@dataclass(frozen=True, kw_only=True)
class Direction:
    """A base direction as the optimizer uses it.

    Attributes:
        name: what ``describe`` shows.
        state: keys of the tensors it keeps, each of the parameter's shape and zero at the start.
        compute: (gradient, state, step, options) -> direction. Updates the state in place, never writes to the
            gradient,
            and may return a state tensor itself. ``step`` is a scalar tensor counting this step as 1, 2, ...
        decays: options that must become 1 for a zero gradient to leave the state untouched; that is how a skipped
            step is carried out where reading a flag would stall the device.
    """

    name: str
    state: tuple[str, ...]
    compute: Callable[[Tensor, Mapping[str, Tensor], Tensor, Mapping[str, Any]], Tensor]
    decays: tuple[str, ...]


def adam(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, *, beta1: Number, beta2: Number, eps: float
) -> Tensor:
    """The bias-corrected Adam direction m̂ / (√v̂ + ε); updates both moments in place.

    Args:
        grad, exp_avg, exp_avg_sq: any one shape and dtype.
        step: scalar, 1 at the first step.
    """
    exp_avg.lerp_(grad, _like(1 - beta1, grad))
    exp_avg_sq.mul_(beta2).add_(grad * grad * (1 - beta2))
    first = _bias_correction(beta1, step).to(grad.dtype)
    second = _bias_correction(beta2, step).sqrt().to(grad.dtype)
    return (exp_avg / first).div_(exp_avg_sq.sqrt().div_(second).add_(eps))


def fused_adam(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, *, beta1: float, beta2: float, eps: float
) -> Tensor:
    """The same as :func:`adam` in one pass over memory, by torch's fused kernel.

    A fused AdamW step of learning rate −1 on a parameter of zeros, without decay, leaves exactly the direction.
    """
    direction = torch.zeros_like(grad)
    torch._fused_adamw_(
        [direction],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step],
        lr=-1.0,
        beta1=beta1,
        beta2=beta2,
        weight_decay=0.0,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
    return direction


def momentum(grad: Tensor, momentum_buffer: Tensor, *, decay: Number, nesterov: bool) -> Tensor:
    """Momentum as a sum, M ← μM + G; the direction is M, or G + μM with Nesterov. Updates the buffer in place."""
    if not isinstance(decay, Tensor) and serves(grad, momentum_buffer):
        return momentum_step(grad, momentum_buffer, decay=decay, nesterov=nesterov)
    _add_decayed(grad, momentum_buffer, decay, out=momentum_buffer)
    return _add_decayed(grad, momentum_buffer, decay) if nesterov else momentum_buffer


def average(grad: Tensor, momentum_buffer: Tensor, *, decay: Number, nesterov: bool) -> Tensor:
    """Momentum as an average, M ← βM + (1 − β)G; with Nesterov G + β(M − G). Updates the buffer in place."""
    if not isinstance(decay, Tensor) and serves(grad, momentum_buffer):
        return momentum_step(grad, momentum_buffer, decay=decay, nesterov=nesterov, averages=True)
    momentum_buffer.lerp_(grad, _like(1 - decay, grad))
    return torch.lerp(grad, momentum_buffer, _like(decay, grad)) if nesterov else momentum_buffer


def sign(grad: Tensor, momentum_buffer: Tensor, *, decay: Number, nesterov: bool) -> Tensor:
    """The sign of :func:`momentum`'s direction, a new tensor. Updates the buffer in place."""
    if not isinstance(decay, Tensor) and serves(grad, momentum_buffer):
        return momentum_step(grad, momentum_buffer, decay=decay, nesterov=nesterov, sign=True)
    return momentum(grad, momentum_buffer, decay=decay, nesterov=nesterov).sign()


def ademamix(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_slow: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    beta1: Number,
    beta2: Number,
    beta3: Number,
    alpha: float,
    eps: float,
    warmup_steps: int | None,
) -> Tensor:
    """The AdEMAMix direction (m̂₁ + a_t m₂) / (√v̂ + ε); updates the three moments in place.

    Over ``warmup_steps`` a_t grows linearly to ``alpha``, and the half-life of the slow average linearly from that of
    β₁ to that of β₃. Source: arXiv 2409.03137.
    """
    progress = torch.ones_like(step) if warmup_steps is None else (step / warmup_steps).clamp(max=1)
    slow = interpolated_decay(beta1, beta3, progress.double())
    exp_avg.lerp_(grad, _like(1 - beta1, grad))
    exp_avg_slow.lerp_(grad, (1 - slow).to(grad.dtype))
    exp_avg_sq.mul_(beta2).add_(grad * grad * (1 - beta2))
    direction = exp_avg / _bias_correction(beta1, step).to(grad.dtype)
    direction.addcmul_(exp_avg_slow, (alpha * progress).to(grad.dtype))
    return direction.div_(exp_avg_sq.sqrt().div_(_bias_correction(beta2, step).sqrt().to(grad.dtype)).add_(eps))


def interpolated_decay(start: Number, end: Number, progress: Tensor) -> Tensor:
    """The decay whose half-life lies between those of two decays: ½^{1/(1 + (1−x) h(start) + x h(end))}.

    h(β) = ln ½ / ln β − 1, in steps; x in [0, 1] is a float64 scalar. A decay of 1 never halves, and stays 1.
    """

    def half_life(decay: Number) -> Tensor:
        return math.log(0.5) / torch.as_tensor(decay, dtype=torch.float64, device=progress.device).log() - 1

    # Each share only where it counts: zero times an infinite half-life would be no number.
    early = torch.where(progress < 1, (1 - progress) * half_life(start), 0.0)
    late = torch.where(progress > 0, progress * half_life(end), 0.0)
    return torch.pow(0.5, 1 / (1 + early + late).abs())


def _bias_correction(decay: Number, step: Tensor) -> Tensor:
    # Float64: 1 − β^t loses its leading digits in float32 where β = 0.999 and t is small.
    return 1 - torch.as_tensor(decay, dtype=torch.float64, device=step.device) ** step.double()


def _add_decayed(grad: Tensor, buffer: Tensor, decay: Number, out: Tensor | None = None) -> Tensor:
    if isinstance(decay, Tensor):
        return torch.addcmul(grad, buffer, decay.to(buffer.dtype), out=out)
    return torch.add(grad, buffer, alpha=decay, out=out)


def _like(number: Number, tensor: Tensor) -> Any:
    return number.to(tensor.dtype) if isinstance(number, Tensor) else number


def _adam_direction(grad: Tensor, state: Mapping[str, Tensor], step: Tensor, options: Mapping[str, Any]) -> Tensor:
    beta1, beta2 = options["betas"]
    moments = state["exp_avg"], state["exp_avg_sq"]
    if not isinstance(beta1, Tensor) and serves(grad, *moments):
        return adam_direction(grad, *moments, step.item(), beta1=beta1, beta2=beta2, eps=options["eps"])
    function = adam if isinstance(beta1, Tensor) or not fused_kernel_serves(grad, *moments) else fused_adam
    return function(grad, *moments, step, beta1=beta1, beta2=beta2, eps=options["eps"])


def _ademamix_direction(grad: Tensor, state: Mapping[str, Tensor], step: Tensor, options: Mapping[str, Any]) -> Tensor:
    beta1, beta2, beta3 = options["betas"]
    return ademamix(
        grad,
        state["exp_avg"],
        state["exp_avg_slow"],
        state["exp_avg_sq"],
        step,
        beta1=beta1,
        beta2=beta2,
        beta3=beta3,
        alpha=options["alpha"],
        eps=options["eps"],
        warmup_steps=options["slow_warmup_steps"] or options["total_steps"],
    )


def _with_buffer(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def compute(grad: Tensor, state: Mapping[str, Tensor], step: Tensor, options: Mapping[str, Any]) -> Tensor:
        return function(grad, state["momentum_buffer"], decay=options["momentum"], nesterov=options["nesterov"])

    return compute


def fused_kernel_serves(*tensors: Tensor) -> bool:
    """Whether torch's fused Adam kernel takes these: it walks their storage, so one dtype and one memory layout.

    A compiler cannot see into it and fuses the formula as well.
    """
    first = tensors[0]
    return (
        not torch.compiler.is_compiling()
        and first.device.type in ("cpu", "cuda")
        and first.dtype in (torch.float32, torch.float64)
        and all(tensor.dtype == first.dtype and tensor.stride() == first.stride() for tensor in tensors)
    )


ADAM = Direction(name="adam", state=("exp_avg", "exp_avg_sq"), compute=_adam_direction, decays=("betas",))
ADEMAMIX = Direction(
    name="ademamix", state=("exp_avg", "exp_avg_slow", "exp_avg_sq"), compute=_ademamix_direction, decays=("betas",)
)
SIGN = Direction(name="sign", state=("momentum_buffer",), compute=_with_buffer(sign), decays=("momentum",))
MOMENTUM = Direction(name="momentum", state=("momentum_buffer",), compute=_with_buffer(momentum), decays=("momentum",))
AVERAGE = Direction(name="average", state=("momentum_buffer",), compute=_with_buffer(average), decays=("momentum",))
