"""Operator, scale and clip on stacks of directions: the part of a step that changes singular values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spectrim.kernels.lists import Found
from spectrim.optim.grouping.layout import matrix_shapes
from spectrim.optim.rules.rule import Rule
from spectrim.optim.spectral.base import ADAMW_RMS, LEAST_NORM, Part, StepContext
from spectrim.optim.stepping.buckets import Stack

__all__ = ["keep", "operate", "scale_factor", "shape"]


def operate(bucket: Sequence[Stack[Any]]) -> list[float]:
    """Apply operator, scale and clip to the directions in the stacks, in place.

    Returns:
        One factor per entry, by which the caller must multiply its update.
    """
    rule = bucket[0].rule
    if rule.vector:
        for stack in bucket:
            _clip_vectors(stack, rule)
        return [1.0 for stack in bucket for _ in stack.entries]
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
    return [factor for factor, stack in zip(factors, bucket, strict=True) for _ in stack.entries]


def shape(rule: Rule, stacks: Sequence[Sequence[Part]], *, operated: bool = False) -> list[float]:
    """Apply operator, scale and clip to stacks of whole matrices, each given by its parts, in place.

    Args:
        operated: True if operator and scale were applied already.

    Returns:
        One factor per stack, by which the caller must multiply its update.
    """
    context = StepContext(first=rule.first, threshold=rule.threshold)
    everything = [part for some in stacks for part in some]
    factors = [1.0] * len(stacks)
    if not operated:
        if rule.operator is not None:
            rule.operator.whole(everything, context)
        scales = ([scale_factor(rule, part.matrices.shape, _norm(part, rule)) for part in some] for some in stacks)
        last = rule.clip is None
        factors = [_multiplied(some, own, last=last) for some, own in zip(stacks, scales, strict=True)]
    if rule.clip is None:
        return factors
    rule.clip.whole(everything, context)
    return [_multiplied(some, [clip_scale(part.matrices.shape) for part in some], last=True) for some in stacks]


def _clip_vectors(stack: Stack[Any], rule: Rule) -> None:
    if rule.clip is not None:
        rows = stack.tensor.view(len(stack.entries), -1)
        norms = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
        factors = rule.clip.vector_factors(norms, StepContext(threshold=rule.threshold))
        if factors is not None:
            rows.mul_(factors.to(rows.dtype)[:, None])


def clip_scale(shape: Sequence[int]) -> float:
    """The factor √max(1, m/n) on a clipped update (arXiv 2603.14315)."""
    return math.sqrt(max(1.0, shape[-2] / shape[-1]))


def scale_factor(rule: Rule, shape: Sequence[int], norm: Tensor | None) -> float | Tensor:
    """The factor of a rule's ``scale`` for updates of shape (m, n).

    "rms" needs the updates' norms; it returns 0 for norms so small that the inverse would overflow.
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


def _norm(part: Part, rule: Rule) -> Tensor | None:
    if rule.scale == "rms" and part.norm is None:
        norm: Tensor = torch.linalg.matrix_norm(part.matrices)
        return norm
    return part.norm


def _multiplied(parts: Sequence[Part], factors: Sequence[float | Tensor], *, last: bool) -> float:
    """Multiply parts by their factors. If this is the ``last`` operation on them, return a number common to all instead
    of multiplying by it."""
    first = factors[0]
    if last and not isinstance(first, Tensor) and len(set(factors)) == 1:
        return first
    for part, factor in zip(parts, factors, strict=True):
        if isinstance(factor, Tensor):
            part.matrices.mul_(factor.to(part.matrices.dtype)[:, None, None])
        elif factor != 1.0:
            part.matrices.mul_(factor)
    return 1.0


def _gather_state(bucket: Sequence[Stack[Any]], parts: Sequence[Sequence[Part]]) -> None:
    """Stack the operator's state of all parameters into the state of each part."""
    for stack, some in zip(bucket, parts, strict=True):
        views = _state_views(stack)
        for number, part in enumerate(some):
            for key in views[0][number]:
                whole = torch.stack([of_entry[number][key] for of_entry in views])
                # The experts of all parameters form one stack.
                part.state[key] = whole.flatten(0, 1) if stack.layout in ("stack", "transposed_stack") else whole


def _store_state(
    bucket: Sequence[Stack[Any]], parts: Sequence[Sequence[Part]], olds: Sequence[Sequence[dict[str, Tensor]]]
) -> None:
    """Write the operator's new state to the parameters' state, or ``olds`` if the step is skipped."""
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
    """Write ``values`` to ``targets`` unless the step is skipped."""
    if found is not None:
        skip = found > 0
        values = [torch.where(skip, old, new) for old, new in zip(targets, values, strict=True)]
    if targets:
        torch._foreach_copy_(list(targets), list(values))
