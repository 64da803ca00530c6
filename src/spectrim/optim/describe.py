"""A table of what an optimizer does to every parameter.

Works on any ``torch.optim.Optimizer``; says more where groups carry names and layouts (:func:`param_groups`) and
where the optimizer answers ``rule(group, parameter)``. Nothing is computed and no state is created.
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
    """One parameter, as its optimizer treats it.

    Attributes:
        name: the parameter's name, or its place in the groups where it has none.
        shape: as stored; a sharded parameter's whole shape.
        role: matrix, embedding, head or vector; empty where the groups do not say.
        matrix: how it is viewed as matrices (outputs x inputs), such as "3 x (768, 768), transposed".
        rule: what the optimizer does to it; "frozen" where it requires no gradient and has none.
        lr: the learning rate that acts on it.
        weight_decay: the decay that acts on it: a step without a gradient leaves the weight at 1 − lr · weight_decay
            of itself. Of an optimizer of another library what its group says.
        threshold: c of its clip in the next step, or None where nothing is clipped.
        state_bytes: bytes of optimizer state that this process holds for it, or will hold after its first step.
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
    """Rows of :func:`describe`; prints as a table."""

    optimizer: str
    rows: tuple[Row, ...]

    @property
    def parameters(self) -> int:
        """Number of scalars in all parameters."""
        return sum(_count(row.shape) for row in self.rows)

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state that this process holds."""
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
        # Numbers read from the right: the last four columns.
        text = [
            "  ".join(
                cell.rjust(width) if i >= len(widths) - 4 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([text[0], "-" * len(text[0]), *text[1:], "", self.summary()])


def describe(optimizer: torch.optim.Optimizer) -> Description:
    """Tell what an optimizer does to every parameter: how it views it, by which rule, at which rate, with which state.

    Args:
        optimizer: any optimizer. Names are known if it was given named parameters, as :func:`param_groups` gives them.

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
    # .get: the state of torch's optimizers is a defaultdict, and asking it by key would create an entry.
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
    """Learning rate, decay and threshold as the optimizer says that they act, or as its group says."""
    applied = getattr(optimizer, "applied", None)
    if callable(applied):
        lr, weight_decay, threshold = applied(group, parameter)
        return lr, weight_decay, threshold
    return float(group.get("lr", math.nan)), float(group.get("weight_decay") or 0.0), None


def _future_state(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Tensor) -> Mapping[str, Any]:
    """The state that an optimizer of this library will make, without memory; of others nothing is known."""
    make = getattr(optimizer, "state_of", None)
    if make is None or not parameter.requires_grad or type(parameter) not in (Tensor, torch.nn.Parameter):
        return {}
    made: Mapping[str, Any] = make(torch.empty_like(parameter, device="meta"), group, "")
    return made


def _name(group: Mapping[str, Any], group_index: int, index: int) -> str:
    names = group.get("param_names")
    return names[index] if names else f"groups[{group_index}].params[{index}]"


def _matrix(parameter: Tensor, group: Mapping[str, Any]) -> str:
    """The logical matrices in words; equal parts are counted, others listed."""
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
    """Bytes of all tensors in a state, the local part of sharded ones."""
    if isinstance(state, Tensor):
        local = state.to_local() if hasattr(state, "to_local") else state
        return local.numel() * local.element_size()
    if isinstance(state, Mapping):
        return sum(map(_bytes, state.values()))
    if isinstance(state, Sequence) and not isinstance(state, str | bytes):
        return sum(map(_bytes, state))
    return 0


def _count(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
