"""Subjects: the parameters of an optimizer that are matrices, with their names in the model.

The layout comes from the param group, else from the model (:mod:`spectrim.optim.grouping`), else from the number of
dimensions. Names do not include wrappers of the model (DDP, FSDP, ``torch.compile``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from spectrim.distributed.collectives import Team, team_of
from spectrim.distributed.dtensor import is_dtensor
from spectrim.distributed.grid import local_rows
from spectrim.distributed.sharding import Sharding, sharding_of
from spectrim.optim.grouping.layout import Layout, Split, default_layout, matrices, matrix_shapes, sizes_of
from spectrim.optim.grouping.reading import read_model
from spectrim.optim.grouping.roles import Reading, Role, sites
from spectrim.optim.sharded.entry import axes_of, rows_of_parts, take_rows
from spectrim.optim.stepping.entries import parameter_name

__all__ = ["Subject", "subjects_of"]


@dataclass(eq=False)
class Subject:
    """A parameter that is one matrix, several, or stacks of them.

    Attributes:
        name: the parameter's name.
        parameter: the parameter, possibly a DTensor.
        position: index of the group, and of the parameter in the group.
        role, layout, split: as in param groups.
    """

    name: str
    parameter: Tensor
    position: tuple[int, int]
    role: Role
    layout: Layout
    split: Split | None
    sharding: Sharding | None = field(init=False, default=None)
    team: Team | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if is_dtensor(self.parameter):
            self.sharding = sharding_of(self.parameter, self.name)
            self.team = team_of(self.parameter.device_mesh)

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape (m, n) or (E, m, n) of each part."""
        return matrix_shapes(self.parameter.shape, self.layout, self.split)

    @cached_property
    def names(self) -> list[str]:
        """The name of each part."""
        if len(self.shapes) == 1:
            return [self.name]
        return [f"{self.name}[{index}]" for index in range(len(self.shapes))]

    @property
    def is_stack(self) -> bool:
        """True if the first dimension counts matrices."""
        return self.layout in ("stack", "transposed_stack")

    def local(self, tensor: Tensor) -> Tensor:
        """This rank's shard of a tensor like the parameter."""
        return tensor.to_local() if is_dtensor(tensor) else tensor

    def parts(self, tensor: Tensor) -> list[Tensor]:
        """The parts of a whole tensor like the parameter, or of one matrix of its stack."""
        layout = self.layout
        if layout == "flatten":
            # Kernels in channels_last need a copy, since they have no view as matrices.
            return matrices(tensor.reshape(len(tensor), -1), "matrix", self.split)
        if self.is_stack and tensor.ndim == 2:
            layout = "matrix" if layout == "stack" else "transposed"
        return matrices(tensor, layout, self.split)

    def local_parts(self, tensor: Tensor) -> list[Tensor]:
        """Views of this rank's rows of each part, for a local tensor; convolution kernels keep their dimensions."""
        parts = rows_of_parts(self.parameter.shape, self.layout, self.split)
        dim = 0 if self.layout == "flatten" else -2
        (whole,) = [tensor] if self.layout == "flatten" else matrices(tensor, self.layout)
        if self.sharding is None or self.team is None:
            held = [part.runs(whole.shape[dim]) for part in parts]
        else:
            axes = axes_of(self.layout, tensor.ndim)
            held = [local_rows(self.sharding, axes, part, self.team.member) for part in parts]
        return [take_rows(whole, rows, dim) for rows in held]

    @property
    def interleaved(self) -> bool:
        """True if the rows of its parts alternate; :meth:`local_parts` are copies then."""
        return self.split is not None and sizes_of(self.split)[1]

    @property
    def counts(self) -> bool:
        """True if this rank's shard counts in sums over ranks, in which replicas count once."""
        return self.sharding is None or self.team is None or self.sharding.replica(self.team.member) == 0


def subjects_of(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> list[Subject]:
    """Every trainable parameter of the groups that is a matrix, in the groups' order."""
    names = _names(model)
    readings: dict[Tensor, Reading | None] | None = None
    found = []
    for group_index, group in enumerate(groups):
        for index, parameter in enumerate(group["params"]):
            if not parameter.requires_grad or not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            layout, role, split = group.get("layout"), group.get("role"), group.get("split")
            if layout is None:
                readings = _readings(model) if readings is None else readings
                reading = readings.get(parameter)
                if reading is not None:
                    layout, role, split = reading.layout, reading.role, reading.split
            layout = layout or default_layout(parameter.shape)
            if layout == "vector":
                continue
            position = (group_index, index)
            name = names.get(parameter) or parameter_name(groups, position)
            found.append(Subject(name, parameter, position, role or "matrix", layout, split))
    return found


def _names(model: nn.Module) -> dict[Tensor, str]:
    """The first name of every parameter, without the names of wrappers if it remains unique."""
    short: dict[Tensor, str] = {}
    for site in sites(model):
        short.setdefault(site.parameter, ".".join((*site.path, site.leaf)))
    taken = list(short.values())
    full: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {p: name if taken.count(name) == 1 else full.get(p, name) for p, name in short.items()}


def _readings(model: nn.Module) -> dict[Tensor, Reading | None]:
    readings = read_model(model)
    return {parameter: readings.get(name) for name, parameter in model.named_parameters()}
