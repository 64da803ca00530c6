"""The step of parameters that are whole on this rank: prepare → direct → operate → apply, a bucket at a time.

The same code runs on every device, over lists and stacks of tensors, and never reads one. The step of shards
(:mod:`spectrim.optim.sharded`) uses the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spectrim.kernels.adam import adamw_step, stepped_by
from spectrim.kernels.lists import grouped
from spectrim.kernels.update import apply_updates
from spectrim.operators import entry_scale, smooth_shrink
from spectrim.optim.grouping.layout import Layout, Split, put_back
from spectrim.optim.rules.rule import Rule, Shrink
from spectrim.optim.spectral.base import StepContext
from spectrim.optim.stepping.buckets import Stack, buckets, parts_of
from spectrim.optim.stepping.entries import Entry, by_flag
from spectrim.optim.stepping.narrow_state import round_stochastically_
from spectrim.optim.stepping.operate import operate
from spectrim.optim.stepping.shrinkage import Shrinkage, shrinkage_by_kernel

if TYPE_CHECKING:
    from spectrim.optim.directions import State

__all__ = ["apply_to", "bound_norms", "corrected", "directed", "pre_clip", "step_adamw", "step_entries"]


def step_entries(entries: Sequence[Entry]) -> None:
    """Step parameters that need no other rank. Their state's "step" already counts this step."""
    filled = [entry for entry in entries if entry.parameter.numel()]
    shaped: list[Entry] = []
    for one_pass, same in grouped(filled, lambda entry: entry.rule.one_pass).items():
        if one_pass is None:
            shaped += same
            continue
        for some in by_flag(same):
            scaled = shrinkage_by_kernel(some)
            in_buckets = some[0].rule.shrink is not None and scaled is None
            if in_buckets or not step_adamw(some, [entry.grad for entry in some], scaled):
                shaped += some
    for bucket in buckets(by_operators(shaped)):
        step_bucket(bucket)


def by_operators(entries: Sequence[Entry]) -> list[Entry]:
    """Step the entries for which an operator has a kernel of the whole step; returns the other entries."""
    left: list[Entry] = []
    for same in grouped(entries, lambda entry: entry.rule.operator and entry.rule.structure).values():
        operator = same[0].rule.operator
        left += same if operator is None else [e for some in by_flag(same) for e in operator.step_by_kernels(some)]
    return left


def step_bucket(bucket: Sequence[Stack[Any]]) -> None:
    """Step one bucket: stacks of one structure, flag, dtype and device."""
    rule = bucket[0].rule
    entries = [entry for stack in bucket for entry in stack.entries]
    grads = [grad for stack in bucket for grad in prepared(stack)]
    if rule.is_adamw and step_adamw(entries, grads):
        return
    if rule.direction.corrects:
        grads = corrected_bucket(bucket, entries, grads)
    views = [view for stack in bucket for view in stack.tensor.unbind()]
    directed(entries, grads, views)
    del grads
    if rule.shrink_direction is not None:
        for stack in bucket:
            shrink_stack(stack.tensor, stack, rule.shrink_direction)
    if not rule.still:
        apply_to(entries, views, operate(bucket))


def step_adamw(entries: Sequence[Entry], grads: Sequence[Tensor], scaled: Shrinkage | None = None) -> bool:
    """Step entries of one direction by AdamW in one pass; returns False if no kernel takes the tensors."""
    params = [entry.parameter for entry in entries]
    moments = [[entry.state[key] for entry in entries] for key in ("exp_avg", "exp_avg_sq")]
    if not params:
        return True
    counts = [entry.state["step"] for entry in entries]
    by = stepped_by(params, grads, moments[0], moments[1], counts, shrinks=scaled is not None)
    if by == "formula" and scaled is None:
        return False
    rules = [entry.rule for entry in entries]
    beta1, beta2, eps = astuple(rules[0].direction)
    adamw_step(
        params,
        grads,
        moments[0],
        moments[1],
        counts,
        lr=[rule.lr for rule in rules],
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=[rule.weight_decay for rule in rules],
        found=entries[0].found,
        by=by,
        **({} if scaled is None else scaled._asdict()),
    )
    return True


# -- Prepare and direct ------------------------------------------------------------------------------------------------


def prepared(stack: Stack[Any]) -> list[Tensor]:
    """The gradients in float32 or wider, negated, shrunk and pre-clipped as the rule asks.

    Returns the gradients themselves if nothing has to be done."""
    rule = stack.rule
    grads = [entry.grad for entry in stack.entries]
    shrink = rule.shrink_gradient
    if not (rule.maximize or shrink or rule.pre_clip is not None or grads[0].dtype != stack.dtype):
        return grads
    whole = torch.empty((len(grads), *stack.shape), dtype=stack.dtype, device=grads[0].device)
    targets = list(whole.unbind())
    torch._foreach_copy_(targets, grads)
    if rule.maximize:
        whole.neg_()
    if shrink is not None:
        shrink_stack(whole, stack, shrink)
    if rule.pre_clip is not None:
        pre_clip(whole, rule, stack.layout, stack.split)
    return targets


def pre_clip(whole: Tensor, rule: Rule, layout: Layout, split: Split | None) -> None:
    """Clip, in place, the singular values of whole gradients (E, *shape)."""
    parts = parts_of(whole, layout, split)
    rule.pre_clipper.whole(parts, StepContext(threshold=rule.pre_clip))
    put_back([part.matrices for part in parts], whole, layout, split, leading=1)


def shrink_stack(whole: Tensor, stack: Stack[Any], shrink: Shrink) -> None:
    """Shrink, in place, entries that are large against the entry scale of their logical matrix or vector."""
    views = _units(whole, stack)
    for view in views:
        view.copy_(smooth_shrink(view, shrink.factor * entry_scale(view), form=shrink.form))
    put_back(views, whole, stack.layout, stack.split, leading=1)


def _units(whole: Tensor, stack: Stack[Any]) -> list[Tensor]:
    """Views that have one scale per matrix: (E', m, n) for every logical matrix, (E, 1, n) for vectors."""
    views = [part.matrices for part in parts_of(whole, stack.layout, stack.split)]
    return views or [whole.view(len(stack.entries), 1, -1)]


def corrected_bucket(bucket: Sequence[Stack[Any]], entries: Sequence[Entry], grads: Sequence[Tensor]) -> list[Tensor]:
    """The corrected gradients of a bucket, in new tensors, the norm of each logical matrix at most 1."""
    wholes = [torch.empty((len(s.entries), *s.shape), dtype=s.dtype, device=grads[0].device) for s in bucket]
    out = [view for whole in wholes for view in whole.unbind()]
    corrected(entries, grads, out)
    for whole, stack in zip(wholes, bucket, strict=True):
        units = _units(whole, stack)
        for view in units:
            bound_norms(view, torch.linalg.vector_norm(view, dim=(-2, -1), dtype=torch.float64))
        put_back(units, whole, stack.layout, stack.split, leading=1)
    return out


def bound_norms(matrices: Tensor, norms: Tensor) -> None:
    """Divide matrices (..., m, n), or a vector, by their norms (...) where these exceed 1, in place."""
    factors = norms.clamp_min(1).reciprocal().to(matrices.dtype)
    matrices.mul_(factors.view(*factors.shape, *[1] * (matrices.ndim - factors.ndim)))


def corrected(entries: Sequence[Entry], grads: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Write the corrected gradients of entries of one structure to ``out``, and update the state they come from."""
    direction, found = entries[0].rule.direction, entries[0].found
    _on_state(entries, direction.corrects, grads[0].dtype, lambda state: direction.correct(grads, state, out, found))


def directed(entries: Sequence[Entry], grads: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Write the base direction of entries of one structure to ``out``, and update their state."""
    direction, found = entries[0].rule.direction, entries[0].found
    steps = [entry.state["step"] for entry in entries]
    keys = [key for key in direction.keys if key not in direction.corrects]
    _on_state(entries, keys, grads[0].dtype, lambda state: direction.direct(grads, state, steps, out, found))


def _on_state(
    entries: Sequence[Entry], keys: Sequence[str], dtype: torch.dtype, update: Callable[[State], None]
) -> None:
    """Update some of the directions' state, in ``dtype`` if it is kept in bfloat16, to which it is rounded again."""
    rule = entries[0].rule
    stored = {key: [entry.state[key] for entry in entries] for key in keys}
    if not rule.narrow_state:
        update(stored)
        return
    exact = {key: [value.to(dtype) for value in values] for key, values in stored.items()}
    update(exact)
    for key, values in stored.items():
        number = rule.direction.keys.index(key)
        for entry, narrow, wide in zip(entries, values, exact[key], strict=True):
            round_stochastically_(narrow, wide.float(), _seed(entry.rule.steps_taken, *entry.position, number))


def _seed(*numbers: int) -> int:
    """A seed for stochastic rounding, from step, position and state tensor: a resumed run gets the same one."""
    return reduce(lambda seed, number: (seed * 1_000_003 + number) % 2**63, numbers, 0)


# -- Apply -------------------------------------------------------------------------------------------------------------


def apply_to(entries: Sequence[Entry], updates: Sequence[Tensor], factors: Sequence[float] | None = None) -> None:
    """X ← (1 − ηλ)X − η · factor · U for parameters of any kinds; without ``factors``, they are 1."""

    def kind(index: int) -> tuple[Any, ...]:
        found, weight = entries[index].found, entries[index].parameter
        return id(found), weight.device, weight.dtype, weight.is_contiguous(), factors[index] if factors else 1.0

    filled = [index for index, entry in enumerate(entries) if entry.parameter.numel()]
    for (*_, factor), some in grouped(filled, kind).items():
        apply_updates(
            [entries[i].parameter for i in some],
            [updates[i] for i in some],
            lr=[entries[i].rule.lr for i in some],
            weight_decay=[entries[i].rule.weight_decay for i in some],
            scale=factor,
            found=entries[some[0]].found,
        )
