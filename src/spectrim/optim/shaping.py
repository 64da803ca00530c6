"""Operator, scale and clip: from a base direction to the update of one bucket of same-shape matrices.

Relies on the operators; relied on by the optimizer. Everything here is whole-matrix work, and nothing else in
``optim`` is: this is the part that a sharded step has to bring matrices together for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor

from spectrim.native.entries import apply_update as apply_in_one_pass
from spectrim.native.library import serves
from spectrim.native.spikes import apply_low_rank
from spectrim.operators import hard_clip, orthogonalize, soft_clip, soft_clip_vector
from spectrim.operators._stack import reading_is_free
from spectrim.operators.spike import follow_and_shape, start_basis
from spectrim.optim.recipe import Recipe, Scale

__all__ = [
    "Update",
    "apply_update",
    "basis_slices",
    "basis_slices_of",
    "scale_factor",
    "shape_matrices",
    "shape_vector",
    "start_bases",
]

#: The root mean square of a typical AdamW update, which matched scales aim at (arXiv 2602.11185 and torch.optim.Muon
#: alike).
ADAMW_RMS = 0.2

#: Power steps of a spike that has no basis yet, and of every one after it.
FIRST_POWER_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Update:
    """What is subtracted from a weight, times the learning rate: scale · (dense + left rightᵀ).

    The low-rank part stays apart so that Spectra never forms its update.

    Attributes:
        dense: (..., m, n), or any shape for a vector. May be a state tensor: it is never written to.
        left, right: (..., m, k) and (..., n, k), or None.
        scale: a number, or a tensor over the leading dimensions of a stack.
        norm: (...), the Frobenius norm of the unscaled update where the operator knows it.
    """

    dense: Tensor
    left: Tensor | None = None
    right: Tensor | None = None
    scale: float | Tensor = 1.0
    norm: Tensor | None = None

    def at(self, index: int) -> Update:
        """The update of one matrix of the stack."""
        return Update(
            dense=self.dense[index],
            left=None if self.left is None else self.left[index],
            right=None if self.right is None else self.right[index],
            scale=self.scale[index] if isinstance(self.scale, Tensor) and self.scale.ndim else self.scale,
        )

    def formed(self) -> Tensor:
        """The update as one tensor."""
        whole = self.dense
        if self.left is not None and self.right is not None:
            # In one where there is one stack, which spares the product room of its own.
            whole = (
                torch.baddbmm(whole, self.left, self.right.mT) if whole.ndim == 3 else whole + self.left @ self.right.mT
            )
        return whole if isinstance(self.scale, float) and self.scale == 1.0 else whole * _over_matrix(self.scale)


def shape_matrices(
    direction: Tensor,
    recipe: Recipe,
    options: Mapping[str, Any],
    *,
    threshold: float | Tensor | None,
    basis: Tensor | None = None,
    overwrite: bool = False,
) -> tuple[Update, Tensor | None]:
    """Apply a recipe's operator, its scale and the clip to a stack of directions.

    Args:
        direction: (..., m, n).
        recipe: names the operator.
        options: the param group.
        threshold: c of the clip, or None for no clip.
        basis: (..., n, k), the spike's cached basis, for Spectra.
        overwrite: the direction is no state, and may be used up.

    Returns:
        The update, and the new basis where the recipe tracks a spike.
    """
    update, new_basis = Update(dense=direction), None
    if recipe.operator == "orthogonalize":
        update = Update(dense=orthogonalize(direction, steps=options.get("orthogonalize_steps"), overwrite=overwrite))
    elif recipe.operator == "shape_spike":
        assert basis is not None
        steps = FIRST_POWER_STEPS if options["steps_taken"] == 0 else 1
        correction, new_basis = follow_and_shape(direction, basis, steps=steps)
        update = Update(dense=direction, left=correction.U, right=correction.right, norm=correction.norm)
        del correction
    update = replace(update, scale=_scale_of(options["scale"], update))
    if threshold is not None:
        formed = update.formed()
        update = Update(dense=formed)  # whose parts are not held on to while it is clipped
        if options["clip_form"] == "soft":
            clipped = Update(dense=soft_clip(formed, threshold, overwrite=overwrite or formed is not direction))
        else:
            clipped = Update(dense=hard_clip(formed, threshold))
        update = replace(clipped, scale=_scale_of("original", clipped))
    return update, new_basis


def shape_vector(direction: Tensor, options: Mapping[str, Any], *, threshold: float | Tensor | None) -> Update:
    """The update of a parameter that is no matrix: the direction, its norm clipped where a threshold is given."""
    if threshold is None:
        return Update(dense=direction)
    if options["clip_form"] == "hard":
        # A vector is a matrix of one row, whose only singular value is its norm.
        return Update(dense=hard_clip(direction.reshape(1, -1), threshold).view_as(direction))
    return Update(dense=soft_clip_vector(direction.reshape(-1), threshold).view_as(direction))


def scale_factor(scale: Scale, shape: Sequence[int], norm: float | Tensor | None = None) -> float | Tensor:
    """The factor that a scale's name stands for, for updates of shape (m, n). "rms" needs their norms, and leaves a
    zero update at zero."""
    outputs, inputs = shape
    if scale == "original":
        return math.sqrt(max(1.0, outputs / inputs))
    if scale == "match_rms_adamw":
        return ADAMW_RMS * math.sqrt(max(outputs, inputs))
    if scale == "rms":
        assert norm is not None
        if isinstance(norm, float):
            return ADAMW_RMS * math.sqrt(outputs * inputs) / norm if norm > 0 else 0.0
        return torch.where(norm > 0, ADAMW_RMS * math.sqrt(outputs * inputs) / norm, torch.zeros_like(norm))
    return 1.0


def _scale_of(scale: Scale, update: Update) -> float | Tensor:
    if scale != "rms":
        return scale_factor(scale, update.dense.shape[-2:])
    norm = torch.linalg.matrix_norm(update.formed()) if update.norm is None else update.norm
    return scale_factor(scale, update.dense.shape[-2:], _readable(norm))


def spike_rank(shape: Sequence[int], rank_ratio: float) -> int:
    """How many directions of an m x n matrix are taken for its spike: max(1, round(r · min(m, n)))."""
    return max(1, round(rank_ratio * min(shape[-2:])))


def basis_slices(views: Sequence[Tensor], rank_ratio: float) -> list[slice]:
    """Which columns of a parameter's cached basis belong to each part of its split; all parts share the inputs n."""
    return basis_slices_of([view.shape for view in views], rank_ratio)


def basis_slices_of(shapes: Sequence[Sequence[int]], rank_ratio: float) -> list[slice]:
    """:func:`basis_slices` of matrices of these shapes."""
    ends = list(itertools.accumulate(spike_rank(shape, rank_ratio) for shape in shapes))
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def start_bases(
    shapes: Sequence[Sequence[int]], rank_ratio: float, *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The basis (..., n, k) that a parameter starts from: fixed numbers, the bases of its parts side by side."""
    bases = []
    for shape in shapes:
        *stack, _, inputs = shape
        rank = spike_rank(shape, rank_ratio)
        bases.append(start_basis(inputs, rank, device=device, dtype=dtype).expand(*stack, inputs, rank))
    return torch.cat(bases, dim=-1)


def apply_update(weight: Tensor, update: Update, lr: float | Tensor, *, keep: float | Tensor) -> None:
    """X ← keep · X − lr · update, in place; ``keep`` is one minus learning rate times weight decay.

    Args:
        weight: (..., m, n) of the update's shape, or a vector. Below float32 the arithmetic is done in float32.
        lr: a number, or a scalar tensor where it lives on the device.
    """
    if weight.dtype in (torch.bfloat16, torch.float16):
        exact = weight.float()
        apply_update(exact, update, lr, keep=keep)
        weight.copy_(exact)
        return
    step = update.scale * lr
    if isinstance(step, Tensor):
        step = _readable(step.to(weight.dtype))
    left, right = update.left, update.right
    if _kernel_applies(weight, update, step, keep):
        numbers = {"keep": float(keep), "step": float(step)}
        if left is not None and right is not None:
            apply_low_rank(weight, update.dense, left, right, **numbers)
        else:
            apply_in_one_pass(weight, update.dense, **numbers)
        return
    if left is not None and right is not None and weight.ndim == 2 and isinstance(keep, float):
        # One pass over the weight decays it and subtracts the low-rank part.
        weight.addmm_(left * -step, right.mT, beta=keep)
    else:
        if not isinstance(keep, float) or keep != 1.0:
            weight.mul_(keep)
        if left is not None and right is not None:
            weight.sub_((left * _over_matrix(step)) @ right.mT)
    if isinstance(step, Tensor):
        weight.addcmul_(update.dense, _over_matrix(step), value=-1)
    else:
        weight.add_(update.dense, alpha=-step)


def _kernel_applies(weight: Tensor, update: Update, step: float | Tensor, keep: float | Tensor) -> bool:
    """Whether one pass in C does it all: for numbers that can be read, and tensors that lie as it wants them."""
    if any(isinstance(number, Tensor) and number.ndim for number in (step, keep)) or not serves(weight, update.dense):
        return False
    left, right = update.left, update.right
    if left is None or right is None:
        return True
    return weight.ndim == 2 and weight.is_contiguous() and left.is_contiguous() and right.stride(-2) == 1


def _readable(number: Tensor) -> float | Tensor:
    # A Python number lets the host's kernels run at full width; on an accelerator reading it would stall the queue.
    return number.item() if number.numel() == 1 and reading_is_free(number) else number


@overload
def _over_matrix(scale: Tensor) -> Tensor: ...


@overload
def _over_matrix(scale: float) -> float: ...


def _over_matrix(scale: float | Tensor) -> float | Tensor:
    return scale[..., None, None] if isinstance(scale, Tensor) and scale.ndim > 0 else scale
