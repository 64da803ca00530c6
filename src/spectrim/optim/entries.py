"""The parameters of one step, and the buckets in which they go through the operators."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from spectrim.optim.layout import Layout, default_layout
from spectrim.optim.roles import Role

__all__ = ["BUCKET_BYTES", "Entry", "buckets", "parameter_name", "role_and_layout", "stack_length"]

#: How many bytes of same-shape matrices, in float32, go through an operator at once; one matrix always may. On the host
#: only small ones gain from company: a large one fills the cores by itself and need not be copied into a stack.
BUCKET_BYTES = {"cpu": 4 * 2**20}
BUCKET_BYTES_ELSEWHERE = 256 * 2**20


@dataclass(kw_only=True, eq=False)
class Entry:
    """One parameter within a step.

    Attributes:
        position: indices of its group and of itself in the group.
        energy, present: of a sharded parameter, the squared norm of its whole gradient and whether any rank has one, as
            screening found; None before, and for a parameter of this process alone.
        taken: a flag on the device, false where this step is skipped; None where that was read and the step is taken.
    """

    parameter: Tensor
    grad: Tensor
    role: Role
    layout: Layout
    position: tuple[int, int]
    state: dict[str, Tensor] = field(default_factory=dict)
    taken: Tensor | None = None
    energy: Tensor | None = None
    present: Tensor | None = None


AnyEntry = TypeVar("AnyEntry", bound=Entry)


def role_and_layout(group: Mapping[str, Any], parameter: Tensor) -> tuple[Role, Layout]:
    """What a parameter is: as its group says, or by its dimensions where the group is a plain list."""
    layout: Layout = group.get("layout") or default_layout(parameter.shape)
    role: Role = group.get("role") or ("vector" if layout == "vector" else "matrix")
    return role, layout


def parameter_name(groups: Sequence[Mapping[str, Any]], position: tuple[int, int]) -> str:
    """A parameter's name, or its group and place where it was given none."""
    group, index = position
    names = groups[group].get("param_names")
    return str(names[index]) if names else f"group {group}, parameter {index}"


def buckets(entries: Iterable[AnyEntry]) -> Iterator[list[AnyEntry]]:
    """Group entries that one batched operator can serve, in order, each bucket within its limit of bytes."""
    alike: dict[tuple[Any, ...], list[AnyEntry]] = {}
    for entry in entries:
        parameter = entry.parameter
        key = (entry.role, entry.layout, parameter.shape, parameter.dtype, parameter.device)
        alike.setdefault(key, []).append(entry)
    for same in alike.values():
        length = stack_length(same[0].parameter)
        for start in range(0, len(same), length):
            yield same[start : start + length]


def stack_length(tensor: Tensor) -> int:
    """How many tensors like this one go through an operator at once."""
    limit = BUCKET_BYTES.get(tensor.device.type, BUCKET_BYTES_ELSEWHERE)
    return max(1, limit // max(1, 4 * tensor.numel()))
