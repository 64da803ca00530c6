"""The step of parameters that are whole on this rank: prepare → direct → operate → apply, a bucket at a time.

Everything goes over lists and stacks, the same on every device; nothing is read. The step of shards
(:mod:`spectrim.optim.sharded`) is made of the same parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spectrim.kernels.adam import adamw_step, stepped_by
from spectrim.kernels.lists import Found
from spectrim.kernels.update import apply_updates
from spectrim.operators import entry_scale, smooth_shrink
from spectrim.optim.grouping.layout import matrix_shapes, put_back
from spectrim.optim.rules.rule import Rule, Shrink
from spectrim.optim.spectral.base import ADAMW_RMS, LEAST_NORM, Part, StepContext
from spectrim.optim.stepping.buckets import Stack, buckets, parts_of
from spectrim.optim.stepping.entries import Entry, by_flag
from spectrim.optim.stepping.narrow_state import round_stochastically_
from spectrim.optim.stepping.shrinkage import Shrinkage, shrinkage_by_kernel

__all__ = [
    "apply_to",
    "directed",
    "keep",
    "scale_factor",
    "shape",
    "step_adamw",
    "step_entries",
]


def step_entries(entries: Sequence[Entry]) -> None:
    """Step parameters that need this rank alone; their steps are counted already."""
    plain: dict[tuple[Any, ...], list[Entry]] = {}
    shaped: list[Entry] = []
    # Of every rule once: groups of one optimizer may differ in their betas. None where it is not AdamW in one pass.
    numbers: dict[int, tuple[Any, ...] | None] = {}
    for entry in entries:
        rule = entry.rule
        if not entry.parameter.numel():
            continue
        if id(rule) not in numbers:
            in_one_pass = rule.is_adamw and not rule.maximize and not rule.shrinks_direction
            numbers[id(rule)] = (*rule.direction.numbers, rule.shrink) if in_one_pass else None
        own = numbers[id(rule)]
        if own is None:
            shaped.append(entry)
        else:
            plain.setdefault(own, []).append(entry)
    for same in plain.values():
        for some in by_flag(same):
            scaled = shrinkage_by_kernel(some)
            in_buckets = some[0].rule.shrink is not None and scaled is None
            if in_buckets or not step_adamw(some, [entry.grad for entry in some], scaled):
                shaped += some
    for bucket in buckets(by_operators(shaped)):
        step_bucket(bucket)


def by_operators(entries: Sequence[Entry]) -> list[Entry]:
    """Step what operators can by kernels of their own, whole; returns the entries that are left."""
    alike: dict[tuple[Any, ...], list[Entry]] = {}
    structures: dict[int, tuple[Any, ...]] = {}
    left = []
    for entry in entries:
        rule = entry.rule
        if rule.operator is None:
            left.append(entry)
            continue
        if id(rule) not in structures:
            structures[id(rule)] = rule.structure
        alike.setdefault(structures[id(rule)], []).append(entry)
    for same in alike.values():
        operator = same[0].rule.operator
        assert operator is not None
        for some in by_flag(same):
            left += operator.step_by_kernels(some)
    return left


def step_bucket(bucket: Sequence[Stack[Any]]) -> None:
    """Step one bucket: stacks of one structure, flag, dtype and device."""
    rule = bucket[0].rule
    entries = [entry for stack in bucket for entry in stack.entries]
    grads = [grad for stack in bucket for grad in prepared(stack)]
    if rule.is_adamw and not rule.shrinks_direction and step_adamw(entries, grads):
        return
    directed(entries, grads, [view for stack in bucket for view in stack.tensor.unbind()])
    del grads
    if rule.shrink is not None and rule.shrinks_direction:
        for stack in bucket:
            shrink_stack(stack.tensor, stack, rule.shrink)
    if rule.still:
        return
    apply(bucket, operate(bucket))


def step_adamw(entries: Sequence[Entry], grads: Sequence[Tensor], scaled: Shrinkage | None = None) -> bool:
    """AdamW in one pass, where a kernel takes the tensors; else False. All entries have the direction of the first."""
    params = [entry.parameter for entry in entries]
    moments = [[entry.state[key] for entry in entries] for key in ("exp_avg", "exp_avg_sq")]
    if not params:
        return True
    counts = [entry.state["step"] for entry in entries]
    by = stepped_by(params, grads, moments[0], moments[1], counts, shrinks=scaled is not None)
    if by == "formula" and scaled is None:
        return False
    rules = [entry.rule for entry in entries]
    _, beta1, beta2, eps = rules[0].direction.numbers
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
    """The gradients as the base direction takes them: in float32 or better, their sign turned where the rule
    maximizes, their entries shrunk, their singular values clipped. The very gradients where there is nothing to do."""
    rule = stack.rule
    grads = [entry.grad for entry in stack.entries]
    shrinks = rule.shrink is not None and rule.shrinks_gradient
    if not (rule.maximize or shrinks or rule.pre_clip is not None or grads[0].dtype != stack.dtype):
        return grads
    whole = torch.empty((len(grads), *stack.shape), dtype=stack.dtype, device=grads[0].device)
    targets = list(whole.unbind())
    torch._foreach_copy_(targets, grads)
    if rule.maximize:
        whole.neg_()
    if rule.shrink is not None and shrinks:
        shrink_stack(whole, stack, rule.shrink)
    if rule.pre_clip is not None:
        parts = parts_of(whole, stack.layout, stack.split)
        rule.pre_clipper.whole(parts, StepContext(threshold=rule.pre_clip, first=rule.first))
        put_back([part.matrices for part in parts], whole, stack.layout, stack.split, leading=1)
    return targets


def shrink_stack(whole: Tensor, stack: Stack[Any], shrink: Shrink) -> None:
    """Shrink, in place, the entries that are large against the scale of their logical matrix, or vector."""
    units = _units(whole, stack)
    for view in units:
        view.copy_(smooth_shrink(view, shrink.factor * entry_scale(view), form=shrink.form))
    put_back(units, whole, stack.layout, stack.split, leading=1)


def _units(whole: Tensor, stack: Stack[Any]) -> list[Tensor]:
    """What has one scale each: (E', m, n) for every logical matrix, (E, 1, n) for vectors."""
    if stack.layout == "vector":
        return [whole.view(len(stack.entries), 1, -1)]
    return [part.matrices for part in parts_of(whole, stack.layout, stack.split)]


def directed(entries: Sequence[Entry], grads: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Write the base direction of entries of one structure to ``out``, and update their state."""
    rule, found = entries[0].rule, entries[0].found
    steps = [entry.state["step"] for entry in entries]
    stored = {key: [entry.state[key] for entry in entries] for key in rule.direction.keys}
    if not rule.narrow_state:
        rule.direction.direct(grads, stored, steps, out, found)
        return
    exact = {key: [value.to(grads[0].dtype) for value in values] for key, values in stored.items()}
    rule.direction.direct(grads, exact, steps, out, found)
    for number, (key, values) in enumerate(stored.items()):
        for entry, narrow, wide in zip(entries, values, exact[key], strict=True):
            round_stochastically_(narrow, wide.float(), _seed(entry.rule.steps_taken, *entry.position, number))


def _seed(*numbers: int) -> int:
    """One seed for each place and moment at which state is rounded; the same in a resumed run."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number) % 2**63
    return seed


# -- Operate -----------------------------------------------------------------------------------------------------------


def operate(bucket: Sequence[Stack[Any]]) -> list[float]:
    """Apply operator, scale and clip to the directions that the stacks hold.

    Returns:
        For every stack the factor by which what it holds then is still to be multiplied.
    """
    rule = bucket[0].rule
    if rule.vector:
        for stack in bucket:
            _clip_vectors(stack, rule)
        return [1.0] * len(bucket)
    parts = [stack.parts() for stack in bucket]
    keeps = rule.operator is not None and bool(rule.operator.keys)
    if keeps:
        _gather_state(bucket, parts)
        olds = [[dict(part.state) for part in some] for some in parts]
    factors = shape(rule, parts)
    if keeps:
        _store_state(bucket, parts, olds)
    for stack, some in zip(bucket, parts, strict=True):
        stack.put_back(some)
    return factors


def shape(rule: Rule, stacks: Sequence[Sequence[Part]], *, operated: bool = False) -> list[float]:
    """Apply operator, scale and clip to stacks of whole matrices, each given by its parts.

    Args:
        operated: the operator, with its scale, has done its work already.

    Returns:
        For every stack the factor by which what it holds then is still to be multiplied.
    """
    context = StepContext(first=rule.first, threshold=rule.threshold)
    everything = [part for some in stacks for part in some]
    factors = [1.0] * len(stacks)
    if not operated:
        if rule.operator is not None:
            rule.operator.whole(everything, context)
        factors = [_scaled(some, rule, last=rule.clip is None) for some in stacks]
    if rule.clip is None:
        return factors
    rule.clip.whole(everything, context)
    return [_common_scale(some, [clip_scale(part.matrices.shape) for part in some]) for some in stacks]


def _clip_vectors(stack: Stack[Any], rule: Rule) -> None:
    if rule.clip is not None:
        rows = stack.tensor.view(len(stack.entries), -1)
        norms = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
        factors = rule.clip.vector_factors(norms, StepContext(threshold=rule.threshold))
        if factors is not None:
            rows.mul_(factors.to(rows.dtype)[:, None])


def clip_scale(shape: Sequence[int]) -> float:
    """The factor √max(1, m/n) on what was clipped (arXiv 2603.14315)."""
    return math.sqrt(max(1.0, shape[-2] / shape[-1]))


def scale_factor(rule: Rule, shape: Sequence[int], norm: Tensor | None) -> float | Tensor:
    """The factor that a rule's scale stands for, for updates of shape (m, n) and their norms.

    "rms" needs the norms, and leaves an update at zero that is zero, or so small that its inverse would overflow.
    """
    m, n = shape[-2:]
    if rule.scale == "original":
        return clip_scale(shape)
    if rule.scale == "match_rms_adamw":
        return ADAMW_RMS * math.sqrt(max(m, n))
    if rule.scale == "rms":
        assert norm is not None
        return torch.where(norm > LEAST_NORM, ADAMW_RMS * math.sqrt(m * n) / norm, 0.0)
    return 1.0


def _scaled(parts: Sequence[Part], rule: Rule, *, last: bool) -> float:
    """Scale the parts of one stack, but for a factor that they share, if this is the last thing done to them."""
    factors: list[float] = []
    for part in parts:
        norm = part.norm
        if rule.scale == "rms" and norm is None:
            norm = torch.linalg.matrix_norm(part.matrices)
        factor = scale_factor(rule, part.matrices.shape, norm)
        if isinstance(factor, Tensor):
            part.matrices.mul_(factor.to(part.matrices.dtype)[:, None, None])
            factor = 1.0
        factors.append(factor)
    if last:
        return _common_scale(parts, factors)
    _multiply(parts, factors)
    return 1.0


def _common_scale(parts: Sequence[Part], factors: Sequence[float]) -> float:
    """The factor of all parts; where they differ they are multiplied now, and it is one."""
    if len(set(factors)) == 1:
        return factors[0]
    _multiply(parts, factors)
    return 1.0


def _multiply(parts: Sequence[Part], factors: Sequence[float]) -> None:
    for part, factor in zip(parts, factors, strict=True):
        if factor != 1.0:
            part.matrices.mul_(factor)


def _gather_state(bucket: Sequence[Stack[Any]], parts: Sequence[Sequence[Part]]) -> None:
    """Stack the operator's state of all parameters, part by part."""
    for stack, some in zip(bucket, parts, strict=True):
        views = _state_views(stack)
        for number, part in enumerate(some):
            for key in views[0][number]:
                whole = torch.stack([of_entry[number][key] for of_entry in views])
                # Experts count as matrices of the stack.
                part.state[key] = whole.flatten(0, 1) if stack.layout in ("stack", "transposed_stack") else whole


def _store_state(
    bucket: Sequence[Stack[Any]], parts: Sequence[Sequence[Part]], olds: Sequence[Sequence[dict[str, Tensor]]]
) -> None:
    """Put the operator's new state back, where the step is not skipped; ``olds`` is what it was."""
    found = bucket[0].entries[0].found
    targets: list[Tensor] = []
    values: list[Tensor] = []
    skip = None if found is None else found > 0
    for stack, some, before in zip(bucket, parts, olds, strict=True):
        views = _state_views(stack)
        for number, part in enumerate(some):
            for key, value in part.state.items():
                if skip is not None:
                    value = torch.where(skip, before[number][key], value)
                places = [of_entry[number][key] for of_entry in views]
                targets += places
                values += value.view(len(places), *places[0].shape).unbind()
    torch._foreach_copy_(targets, values)


def _state_views(stack: Stack[Any]) -> list[list[dict[str, Tensor]]]:
    operator = stack.rule.operator
    assert operator is not None
    shapes = matrix_shapes(stack.shape, stack.layout, stack.split)
    return [operator.state_of_parts(entry.state, shapes) for entry in stack.entries]


def keep(targets: Sequence[Tensor], values: Sequence[Tensor], found: Found) -> None:
    """Write new state, or leave the old where the step is skipped."""
    if found is not None:
        skip = found > 0
        values = [torch.where(skip, old, new) for old, new in zip(targets, values, strict=True)]
    if targets:
        torch._foreach_copy_(list(targets), list(values))


# -- Apply -------------------------------------------------------------------------------------------------------------


def apply(bucket: Sequence[Stack[Any]], scales: Sequence[float]) -> None:
    """X ← (1 − ηλ)X − η · scale · (what the stack holds), for all parameters of a bucket."""
    entries = [entry for stack in bucket for entry in stack.entries]
    updates = [view for stack in bucket for view in stack.tensor.unbind()]
    factors = [scale for stack, scale in zip(bucket, scales, strict=True) for _ in stack.entries]
    apply_to(entries, updates, factors)


def apply_to(entries: Sequence[Entry], updates: Sequence[Tensor], factors: Sequence[float]) -> None:
    """Apply one update to each of some parameters of one flag, dtype and device."""
    for factor in dict.fromkeys(factors):
        some = [index for index, own in enumerate(factors) if own == factor]
        apply_updates(
            [entries[i].parameter for i in some],
            [updates[i] for i in some],
            lr=[entries[i].rule.lr for i in some],
            weight_decay=[entries[i].rule.weight_decay for i in some],
            scale=factor,
            found=entries[0].found,
        )
