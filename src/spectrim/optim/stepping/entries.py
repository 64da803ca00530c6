"""Entries: the parameters of one step, each with its gradient, its state and its rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from spectrim.kernels.lists import grouped
from spectrim.optim.grouping.layout import Layout, Split, default_layout
from spectrim.optim.grouping.roles import Role
from spectrim.optim.rules.rule import Rule

__all__ = ["Entry", "by_flag", "kind_of", "parameter_name", "role_and_layout", "whole_entry"]


@dataclass(kw_only=True, eq=False)
class Entry:
    """One parameter in a step. All tensors are local: of a DTensor, this rank's shard.

    Attributes:
        position: index of the group, and of the parameter in the group.
        found: the skip flag: a float32 scalar on the device that is 1 if the step is skipped, or None if the host
            already knows that it is taken.
    """

    parameter: Tensor
    grad: Tensor
    layout: Layout
    split: Split | None
    rule: Rule
    position: tuple[int, int]
    state: dict[str, Tensor] = field(default_factory=dict)
    found: Tensor | None = None


AnyEntry = TypeVar("AnyEntry", bound=Entry)


def whole_entry(
    parameter: Tensor,
    group: Mapping[str, Any],
    position: tuple[int, int],
    name: str,
    state: dict[str, Tensor],
    rule: Rule,
) -> Entry:
    """The entry of a parameter that is whole in this process and has a gradient."""
    grad = parameter.grad
    assert grad is not None
    if grad.is_sparse:
        raise RuntimeError(f"the gradient of {name} is sparse: expected a dense one")
    if grad.shape != parameter.shape:
        raise RuntimeError(
            f"the gradient of {name} has shape {tuple(grad.shape)}: expected the parameter's, {tuple(parameter.shape)}"
        )
    _, layout = role_and_layout(group, parameter)
    split = group.get("split")
    return Entry(parameter=parameter, grad=grad, layout=layout, split=split, rule=rule, position=position, state=state)


def kind_of(entry: Entry) -> tuple[Any, ...]:
    """A key that is equal for entries of the same rule, layout, split and dtype, and the same on every rank."""
    split = None if entry.split is None else tuple(entry.split)
    return (*entry.rule.structure, entry.layout, split, entry.parameter.dtype)


def role_and_layout(group: Mapping[str, Any], parameter: Tensor) -> tuple[Role, Layout]:
    """A parameter's role and layout from its group, or from its number of dimensions if the group has none."""
    layout: Layout = group.get("layout") or default_layout(parameter.shape)
    role: Role = group.get("role") or ("vector" if layout == "vector" else "matrix")
    return role, layout


def parameter_name(groups: Sequence[Mapping[str, Any]], position: tuple[int, int]) -> str:
    """A parameter's name, or "group i, parameter j" if it has none."""
    group, index = position
    names = groups[group].get("param_names")
    return str(names[index]) if names else f"group {group}, parameter {index}"


def by_flag(entries: Iterable[AnyEntry]) -> list[list[AnyEntry]]:
    """Split entries into lists of one skip flag, device and dtypes, so that one kernel call can take each list.

    A step has one flag, except for shards that have no gradient on this rank: each of those has its own.
    """

    def key(entry: AnyEntry) -> tuple[Any, ...]:
        weight = entry.parameter
        return id(entry.found), weight.device, weight.dtype, entry.grad.dtype, weight.is_contiguous()

    return list(grouped(entries, key).values())
