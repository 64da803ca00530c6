"""A table of how an optimizer steps every parameter.

It works for any ``torch.optim.Optimizer``, with more detail if groups carry names and layouts (:func:`param_groups`)
and the optimizer has a method ``rule(group, parameter)``. No state is created.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from spectrim.optim.grouping.layout import matrix_shapes, sizes_of

__all__ = ["Description", "Row", "describe"]


@dataclass(frozen=True)
class Row:
    """One parameter, and how its optimizer steps it.

    Attributes:
        name: the parameter's name, or its position in the groups if it has none.
        shape: as stored; for a sharded parameter the global shape.
        role: matrix, embedding, head or vector; empty if the group has no role.
        matrix: its logical matrices (outputs x inputs), such as "3 x (768, 768), transposed".
        rule: a short description of the step; "frozen" if it requires no gradient and has none.
        lr: its learning rate.
        weight_decay: the decoupled decay: each step multiplies the weight by 1 − lr · weight_decay. For optimizers of
            other libraries, the group's value.
        threshold: the clip threshold c of the next step, or None without a clip.
        state_bytes: bytes of optimizer state in this process, or after the first step if there is none yet.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    matrix: str
    rule: str
    lr: float
    weight_decay: float
    threshold: float | None
    state_bytes: int


@dataclass(frozen=True)
class Description:
    """The result of :func:`describe`, which prints as a table."""

    optimizer: str
    rows: tuple[Row, ...]

    @property
    def parameters(self) -> int:
        """The number of entries of all parameters."""
        return sum(math.prod(row.shape) for row in self.rows)

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state in this process."""
        return sum(row.state_bytes for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Rows and totals as plain values, ready for JSON."""
        return {
            "optimizer": self.optimizer,
            "rows": [{**asdict(row), "shape": list(row.shape)} for row in self.rows],
            "tensors": len(self.rows),
            "parameters": self.parameters,
            "state_bytes": self.state_bytes,
        }

    def cells(self) -> list[tuple[str, ...]]:
        """The table as text: a header, then one line for each row."""
        header = ("name", "shape", "role", "matrix", "rule", "lr", "decay", "clip", "state bytes")
        return [
            header,
            *(
                (
                    row.name,
                    str(row.shape),
                    row.role or "-",
                    row.matrix or "-",
                    row.rule,
                    f"{row.lr:g}",
                    f"{row.weight_decay:g}",
                    "-" if row.threshold is None else f"{row.threshold:g}",
                    f"{row.state_bytes:,}",
                )
                for row in self.rows
            ),
        ]

    def summary(self) -> str:
        """One line of totals."""
        return (
            f"{self.optimizer}: {len(self.rows):,} tensors, {self.parameters:,} parameters, "
            f"{self.state_bytes:,} bytes of state"
        )

    def __str__(self) -> str:
        lines = self.cells()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        # The last four columns are numbers, aligned to the right.
        text = [
            "  ".join(
                cell.rjust(width) if i >= len(widths) - 4 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([text[0], "-" * len(text[0]), *text[1:], "", self.summary()])


def describe(optimizer: torch.optim.Optimizer) -> Description:
    """Describe how an optimizer steps every parameter: logical matrices, rule, learning rate, decay, clip and state.

    Args:
        optimizer: any optimizer. It knows names if it was given named parameters or groups of :func:`param_groups`.

    Returns:
        A description that prints as a table, with ``rows`` and ``to_dict()``.
    """
    return Description(
        optimizer=type(optimizer).__name__,
        rows=tuple(
            _row(optimizer, group, parameter, _name(group, group_index, index))
            for group_index, group in enumerate(optimizer.param_groups)
            for index, parameter in enumerate(group["params"])
        ),
    )


def _row(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Tensor, name: str) -> Row:
    rule = getattr(optimizer, "rule", None)
    frozen = not parameter.requires_grad and parameter.grad is None
    lr, weight_decay, threshold = (0.0, 0.0, None) if frozen else _applied(optimizer, group, parameter)
    label = str(rule(group, parameter)) if callable(rule) else type(optimizer).__name__
    # The state is a defaultdict, in which state[parameter] would create an entry.
    state = optimizer.state.get(parameter) or _future_state(optimizer, group, parameter)
    return Row(
        name=name,
        shape=tuple(parameter.shape),
        role=str(group.get("role") or ""),
        matrix=_matrix(parameter, group),
        rule="frozen" if frozen else label,
        lr=lr,
        weight_decay=weight_decay,
        threshold=threshold,
        state_bytes=_bytes(state),
    )


def _applied(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Tensor
) -> tuple[float, float, float | None]:
    """Learning rate, decay and threshold from the optimizer's method ``applied``, else from the group."""
    if hasattr(optimizer, "applied"):
        lr, weight_decay, threshold = optimizer.applied(group, parameter)
        return lr, weight_decay, threshold
    return float(group.get("lr", math.nan)), float(group.get("weight_decay") or 0.0), None


def _future_state(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Tensor) -> Mapping[str, Any]:
    """The state that an optimizer of this library will make, on the meta device; empty for other optimizers."""
    make = getattr(optimizer, "state_of", None)
    if make is None or not parameter.requires_grad or type(parameter) not in (Tensor, torch.nn.Parameter):
        return {}
    made: Mapping[str, Any] = make(torch.empty_like(parameter, device="meta"), group, "")
    return made


def _name(group: Mapping[str, Any], group_index: int, index: int) -> str:
    names = group.get("param_names")
    return names[index] if names else f"groups[{group_index}].params[{index}]"


def _matrix(parameter: Tensor, group: Mapping[str, Any]) -> str:
    """The logical matrices in words: equal parts as a multiple, others as a sum."""
    layout = group.get("layout")
    if layout is None:
        return ""
    if layout == "vector":
        return "vector"
    shapes = matrix_shapes(parameter.shape, layout, group.get("split"))
    equal = len(set(shapes)) == 1
    text = " + ".join(str(shape[-2:]) for shape in (shapes[:1] if equal else shapes))
    if equal and len(shapes) > 1:
        text = f"{len(shapes)} x {text}"
    if len(shapes[0]) == 3:
        text = f"{shapes[0][0]} x {text}" if equal else f"{shapes[0][0]} x [{text}]"
    if group.get("split") and sizes_of(group["split"])[1]:
        text += ", interleaved"
    if layout in ("transposed", "transposed_stack"):
        return f"{text}, transposed"
    return f"{text}, flattened" if layout == "flatten" else text


def _bytes(state: Any) -> int:
    """Bytes of all tensors in a state; for sharded tensors, of the local part."""
    if isinstance(state, Tensor):
        local = state.to_local() if hasattr(state, "to_local") else state
        return local.numel() * local.element_size()
    if isinstance(state, Mapping):
        return sum(map(_bytes, state.values()))
    if isinstance(state, Sequence) and not isinstance(state, str | bytes):
        return sum(map(_bytes, state))
    return 0
