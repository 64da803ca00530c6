"""The parts of one parameter's step that work entry by entry: its direction, its update, and AdamW in one pass.

They run on a shard as on the whole. Between direction and update comes :mod:`shaping`. Relied on by the optimizer, in
one process and in many.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spectrim.native.entries import adam_step
from spectrim.native.library import serves
from spectrim.operators import entry_scale
from spectrim.optim.directions import ADAM, fused_kernel_serves
from spectrim.optim.entries import Entry
from spectrim.optim.gradient import prepare, shrink_entries, shrink_factor, shrinks_in_blocks, shrunk_blocks
from spectrim.optim.recipe import Recipe
from spectrim.optim.rounding import round_stochastically_
from spectrim.optim.shaping import Update, apply_update

__all__ = ["apply", "direct", "fused_adamw", "fused_adamw_serves", "is_adamw", "is_plain_adamw", "store"]


def is_plain_adamw(recipe: Recipe, options: Mapping[str, Any]) -> bool:
    """Whether a step is torch's AdamW and nothing else."""
    return is_adamw(recipe, options) and options["shrink"] is None


def is_adamw(recipe: Recipe, options: Mapping[str, Any]) -> bool:
    """Whether a step is torch's AdamW, but for a gradient that may be shrunk first."""
    plain = recipe.direction is ADAM and recipe.operator == "none" and options["scale"] == "none"
    return plain and options["clip"] is None and options["pre_clip"] is None


def fused_adamw_serves(entry: Entry, options: Mapping[str, Any]) -> bool:
    """Whether :func:`fused_adamw` takes a parameter."""
    state = entry.state
    if not fused_kernel_serves(entry.parameter, entry.grad, state["exp_avg"], state["exp_avg_sq"]):
        return False
    return options["shrink"] is None or shrinks_in_blocks(entry.parameter, options, entry.layout)


def fused_adamw(entry: Entry, options: Mapping[str, Any], weight_decay: float) -> None:
    """AdamW in one pass over memory, by torch's fused kernel; it takes the flag of a skipped step by itself.

    With shrinkage, in one more: what is shrunk goes to the kernel block by block and never to memory.
    """
    beta1, beta2 = options["betas"]
    tensors = (entry.parameter, entry.grad, entry.state["exp_avg"], entry.state["exp_avg_sq"])
    if options["shrink"] is not None and entry.taken is None and serves(*tensors):
        adam_step(
            *tensors,
            entry.state["step"].item(),
            lr=float(options["lr"]),
            beta1=beta1,
            beta2=beta2,
            eps=options["eps"],
            weight_decay=weight_decay,
            maximize=options["maximize"],
            tau=shrink_factor(options) * entry_scale(entry.grad.view(-1)).item(),
            form=options["shrink_form"],
        )
        return
    blocks = [tensors] if options["shrink"] is None else shrunk_blocks(*tensors, options=options)
    for parameter, grad, exp_avg, exp_avg_sq in blocks:
        torch._fused_adamw_(
            [parameter],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            [],
            [entry.state["step"]],
            lr=options["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=options["eps"],
            amsgrad=False,
            maximize=options["maximize"],
            found_inf=None if entry.taken is None else (~entry.taken).float(),
        )


def direct(recipe: Recipe, options: Mapping[str, Any], entry: Entry) -> Tensor:
    """The base direction of one parameter, in float32 or better; updates its state."""
    grad, taken = prepare(entry.grad, options, entry.layout), entry.taken
    if taken is not None:
        options = {**options, **{key: _held(options[key], taken) for key in recipe.direction.decays}}
    stored = {key: entry.state[key] for key in recipe.direction.state}
    narrow = options["state_dtype"] == "bfloat16"
    state = {key: value.float() for key, value in stored.items()} if narrow else stored
    direction = recipe.direction.compute(grad, state, entry.state["step"], options)
    if narrow:
        for number, (key, value) in enumerate(stored.items()):
            round_stochastically_(value, state[key], _seed(options["steps_taken"], *entry.position, number))
    if options["shrink"] is not None and options["shrink_at"] == "direction":
        direction = shrink_entries(direction, options, entry.layout)
    return direction if taken is None else torch.where(taken, direction, 0)


def _seed(*numbers: int) -> int:
    """One seed for each place and moment at which state is rounded; the same in a resumed run."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number) % 2**63
    return seed


def _held(decay: float | tuple[float, ...], taken: Tensor) -> Any:
    """A decay, or several, that is 1 where the step is skipped: with a zero gradient the state then stays as it is."""
    if isinstance(decay, tuple):
        return tuple(_held(value, taken) for value in decay)
    # Float64, so that the float32 arithmetic it enters is that of the Python number.
    return torch.where(taken, torch.full((), decay, dtype=torch.float64, device=taken.device), 1.0)


def apply(entry: Entry, weight: Tensor, update: Update, options: Mapping[str, Any], weight_decay: float) -> None:
    """Decay a weight, or a view of it, and subtract an update; nothing where the step is skipped."""
    lr = options["lr"] if entry.taken is None else options["lr"] * entry.taken
    apply_update(weight, update, lr, keep=1 - lr * weight_decay)


def store(entry: Entry, target: Tensor, value: Tensor) -> None:
    """Write to a state tensor; nothing where the step is skipped."""
    target.copy_(value if entry.taken is None else torch.where(entry.taken, value, target))
