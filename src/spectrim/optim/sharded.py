"""Parameters that are DTensors: as entries of local tensors, and what their ranks agree on before a step.

An entry of a sharded parameter holds this rank's shard of everything, so whatever works entry by entry runs as in one
process. :func:`screen` finds, in one reduction for all parameters of a mesh, which of them take a step and the scales
that shrinkage needs. Relies on :mod:`spectrim.distributed`; :mod:`sharded_update` does the rest of the step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from spectrim.distributed.collectives import Team, team_of
from spectrim.distributed.grid import Axes, Grid, basis_sharding, grid_of, local_sizes
from spectrim.distributed.runs import put, take
from spectrim.distributed.sharding import Sharding, sharding_of
from spectrim.operators import ShrinkForm, entry_scale, smooth_shrink
from spectrim.optim.entries import Entry, role_and_layout
from spectrim.optim.gradient import squared_norm
from spectrim.optim.layout import Layout, matrices, matrix_shapes
from spectrim.optim.recipe import Recipe
from spectrim.optim.shaping import start_bases

__all__ = [
    "AnyShard",
    "ShardedEntry",
    "axes_of",
    "by_team",
    "laid_like",
    "local_gradient",
    "local_state",
    "screen",
    "sharded_entry",
    "start_basis_of",
]


@dataclass(kw_only=True, eq=False)
class ShardedEntry(Entry):
    """This rank's shard of a parameter. All tensors are local ones, ``state`` among them.

    Attributes:
        has_gradient: on this rank; where not, ``grad`` is zeros.
        shares_scales: entries are shrunk by scales that no rank knows by itself.
        scales: of each logical matrix, as :meth:`views` lists them, after screening; :attr:`mean_scale` over all ranks.
    """

    sharding: Sharding
    team: Team
    split: Sequence[int] | None
    has_gradient: bool
    shares_scales: bool = False
    scales: list[Tensor] = field(default_factory=list)
    mean_scale: Tensor | None = None

    @property
    def axes(self) -> Axes:
        """Which dimensions are rows and columns."""
        return axes_of(self.layout, len(self.sharding.shape))

    @property
    def parts(self) -> list[tuple[int, int]]:
        """The rows of each logical matrix, from start up to stop."""
        sizes = [shape[-2] for shape in matrix_shapes(self.sharding.shape, self.layout, self.split)]
        ends = list(itertools.accumulate(sizes))
        return list(zip([0, *ends], ends, strict=False))

    @property
    def grids(self) -> list[Grid]:
        """How each logical matrix lies on the mesh."""
        return [grid_of(self.sharding, self.axes, part) for part in self.parts]

    def views(self, tensor: Tensor) -> list[Tensor]:
        """This rank's blocks of the logical matrices of a local tensor, some of which may be empty; a vector is one."""
        if self.layout == "vector":
            return [tensor]
        (whole,) = matrices(tensor, self.layout)
        sizes = local_sizes(self.sharding, self.axes, self.parts, self.team.member)
        return list(torch.split(whole, sizes, dim=-2))

    def is_whole(self) -> bool:
        """Whether every matrix that this rank has a part of is all here; a vector as a whole."""
        if self.layout == "vector":
            return not any(map(self.sharding.divides, range(len(self.sharding.shape))))
        return not any(map(self.sharding.divides, self.axes.rows + self.axes.columns))

    def is_alone(self) -> bool:
        """Whether that is so and no other rank has the same ones: nobody has to be asked, and no work is shared."""
        return self.is_whole() and self.sharding.replicas == 1

    def is_served_locally(self, recipe: Recipe, options: Mapping[str, Any]) -> bool:
        """Whether the step of a recipe needs nothing from other ranks, once the gradient is screened."""
        if self.layout == "vector":
            return self.is_whole() or (options["clip"] is None and options["shrink"] is None)
        dense = options["clip"] is not None or options["pre_clip"] is not None or recipe.operator == "orthogonalize"
        if self.is_whole():
            # Replicas share work that is worth a message.
            return not dense or self.sharding.replicas == 1
        plain = not dense and recipe.operator == "none" and options["shrink"] is None and options["scale"] == "none"
        # The sizes of a split are those of the whole, and do not fit a part.
        return plain and self.split is None

    def root_sums(self, tensor: Tensor) -> list[Tensor]:
        """The sum of √|y| over this rank's part of every logical matrix, up to one factor, for all E of a stack."""
        sums = []
        for view in self.views(tensor):
            count_here = math.prod(view.shape[-2:])
            found = entry_scale(view).double().sqrt() * count_here
            if self.layout != "vector" and self.axes.stack is not None:
                whole = found.new_zeros(self.sharding.shape[self.axes.stack])
                put(whole, [self.sharding.regions[self.team.member][self.axes.stack]], found)
                found = whole
            # Replicas would count twice.
            sums.append(found if self.sharding.replica[self.team.member] == 0 else torch.zeros_like(found))
        return sums

    def set_scales(self, sums: Sequence[Tensor]) -> None:
        """Take the totals of :meth:`root_sums` for scales."""
        self.scales, everywhere = [], []
        if self.layout == "vector":
            sizes = [math.prod(self.sharding.shape)]
        else:
            sizes = [math.prod(shape[-2:]) for shape in matrix_shapes(self.sharding.shape, self.layout, self.split)]
        for total, size in zip(sums, sizes, strict=True):
            scale = (total / max(size, 1)).square().to(torch.promote_types(self.grad.dtype, torch.float32))
            everywhere.append(scale.reshape(-1))
            if self.layout != "vector" and self.axes.stack is not None:
                scale = take(scale, [self.sharding.regions[self.team.member][self.axes.stack]])
            self.scales.append(scale)
        self.mean_scale = torch.cat(everywhere).mean()

    def shrunk(self, tensor: Tensor, factor: float, form: ShrinkForm) -> Tensor:
        """A local tensor whose entries are shrunk against the scales."""
        result = torch.empty_like(tensor)
        for source, target, scale in zip(self.views(tensor), self.views(result), self.scales, strict=True):
            target.copy_(smooth_shrink(source, factor * scale, form=form))
        return result


AnyShard = TypeVar("AnyShard", bound=ShardedEntry)


def sharded_entry(
    parameter: DTensor, group: Mapping[str, Any], position: tuple[int, int], name: str, state: Mapping[str, Any]
) -> ShardedEntry:
    """The entry of a parameter of a group; the gradient is zeros where this rank has none."""
    role, layout = role_and_layout(group, parameter)
    local, found = parameter.to_local(), local_gradient(parameter, name)
    # Of the dtype that gradients have on other ranks, which torch lets differ from the parameter's.
    dtype = getattr(parameter, "grad_dtype", None)
    return ShardedEntry(
        parameter=local,
        grad=torch.zeros_like(local, dtype=dtype) if found is None else found,
        state=local_state(state),
        role=role,
        layout=layout,
        position=position,
        sharding=sharding_of(parameter, name),
        team=team_of(parameter.device_mesh),
        split=group.get("split"),
        has_gradient=found is not None,
    )


def axes_of(layout: Layout, dimensions: int) -> Axes:
    """Which dimensions of a parameter its layout calls rows, columns and stack."""
    found = {
        "matrix": Axes((0,), (1,)),
        "transposed": Axes((1,), (0,)),
        "stack": Axes((1,), (2,), 0),
        "transposed_stack": Axes((2,), (1,), 0),
    }
    return found.get(layout) or Axes((0,), tuple(range(1, dimensions)))


def start_basis_of(
    parameter: Tensor, layout: Layout, split: Sequence[int] | None, rank_ratio: float, dtype: torch.dtype
) -> Tensor:
    """The basis (E,) n x k that a parameter starts from; of a DTensor a DTensor, of which this rank keeps its part."""
    shapes = matrix_shapes(parameter.shape, layout, split)
    if not isinstance(parameter, DTensor):
        return start_bases(shapes, rank_ratio, device=parameter.device, dtype=dtype)
    mesh, axes = parameter.device_mesh, axes_of(layout, parameter.ndim)
    # Whole for a moment, but one matrix of a stack only: a basis is small.
    whole = start_bases([shape[-2:] for shape in shapes], rank_ratio, device=parameter.device, dtype=dtype)
    kept = basis_sharding(sharding_of(parameter, ""), axes, whole.shape[-1])
    whole = whole.expand(kept.shape)
    local = take(whole, kept.regions[team_of(mesh).member]).clone(memory_format=torch.contiguous_format)
    placements = [Replicate() if split is None else Shard(split.dim) for split in kept.splits]
    stride = torch.empty(kept.shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(kept.shape), stride=stride)


def local_gradient(parameter: DTensor, name: str) -> Tensor | None:
    """This rank's shard of a parameter's gradient, or None."""
    grad = parameter.grad
    if grad is None:
        return None
    if not isinstance(grad, DTensor):
        raise ValueError(f"the gradient of {name!r} is a {type(grad).__name__}: expected a DTensor like the parameter")
    if grad.placements != parameter.placements or grad.device_mesh != parameter.device_mesh:
        grad = grad.redistribute(parameter.device_mesh, parameter.placements)
    return grad.to_local()


def laid_like(parameter: DTensor, local: Tensor) -> DTensor:
    """A DTensor of a parameter's layout around this rank's shard."""
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def local_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """State whose DTensors are replaced by their local tensors, which share their memory."""
    return {key: value.to_local() if isinstance(value, DTensor) else value for key, value in state.items()}


def screen(entries: Sequence[ShardedEntry]) -> None:
    """Find which parameters take a step, the same on every rank, and the scales that shrinkage needs.

    A parameter takes a step if any rank has a gradient of it; shards that others lack count as zeros. Where only some
    of a shard's replicas have one it counts as not finite: whichever way they went, they would part.
    """
    for team, found in by_team(entries):
        pieces: list[Tensor] = []
        for entry in found:
            pieces.append(_flags(entry))
            if entry.shares_scales:
                pieces += [sums.reshape(-1) for sums in entry.root_sums(entry.grad)]
        total = torch.cat(pieces)
        team.sum(total, "screening")
        numbers = iter(torch.split(total, [len(piece) for piece in pieces]))
        for entry in found:
            energy, present, parted = next(numbers).unbind()
            dtype = torch.promote_types(entry.grad.dtype, torch.float32)
            energy = torch.where(parted == 0, energy / entry.sharding.replicas, torch.nan).to(dtype)
            entry.energy = energy
            entry.present = present > 0
            if entry.shares_scales:
                entry.set_scales([_as_scalar(next(numbers), entry) for _ in entry.views(entry.grad)])


def _as_scalar(numbers: Tensor, entry: ShardedEntry) -> Tensor:
    return numbers if entry.layout != "vector" and entry.axes.stack is not None else numbers[0]


def by_team(entries: Iterable[AnyShard]) -> list[tuple[Team, list[AnyShard]]]:
    """Entries with those of the same ranks, in order."""
    found: dict[tuple[Any, ...], tuple[Team, list[AnyShard]]] = {}
    for entry in entries:
        found.setdefault(entry.team.key, (entry.team, []))[1].append(entry)
    return list(found.values())


def _flags(entry: ShardedEntry) -> Tensor:
    """Squared norm, whether there is a gradient, and a number whose sum is zero where replicas agree on that."""
    sharding, me = entry.sharding, entry.team.member
    energy = squared_norm(entry.grad).double()
    first = sharding.replica[me] == 0
    # Whole numbers, so that sums are exact; scattered, so that disagreements of several shards do not cancel.
    weight = 1 + sharding.shard[me] * 40503 % 65521
    parted = weight * entry.has_gradient * ((sharding.replicas if first else 0) - 1)
    present = torch.tensor([entry.has_gradient, parted], dtype=torch.float64)
    return torch.cat([energy.reshape(1), present.to(energy.device)])
