"""Entries of sharded parameters (DTensors). They hold local tensors, so entry-wise work runs as in one process."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from spectrim.distributed.collectives import Team, team_of
from spectrim.distributed.dtensor import dtensor_of, is_dtensor
from spectrim.distributed.grid import Axes, Grid, Rows, basis_sharding, grid_of, local_rows
from spectrim.distributed.intervals import Intervals, put, take
from spectrim.distributed.sharding import Sharding, sharding_of
from spectrim.kernels.lists import grouped
from spectrim.operators import entry_scale, smooth_shrink
from spectrim.optim.grouping.layout import Layout, Split, matrices, matrix_shapes, sizes_of
from spectrim.optim.rules.rule import Rule, Shrink
from spectrim.optim.stepping.entries import Entry, role_and_layout

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement

__all__ = [
    "AnyShard",
    "ShardedEntry",
    "axes_of",
    "by_team",
    "laid_like",
    "local_gradient",
    "rows_of_parts",
    "sharded_entry",
    "sharded_state",
    "take_rows",
]


@dataclass(kw_only=True, eq=False)
class ShardedEntry(Entry):
    """This rank's shard of a parameter. All tensors, including ``state``, are local.

    Attributes:
        sharding: how the parameter is divided over the mesh.
        team: the ranks of the mesh.
        has_gradient: True if this rank has a gradient; otherwise ``grad`` is zeros.
        shares_scales: True if shrinking needs entry scales that are summed over ranks.
        total: set by screening: the sum of the shards' values, NaN if the gradient is not finite on any rank; see
            :func:`~spectrim.optim.screening.shard_screening.screen_shards`.
        present: set by screening: True if any rank has a gradient.
        scales: set by screening: the entry scale of each logical matrix of :meth:`views`.
        mean_scale: set by screening: the mean entry scale of all matrices on all ranks.
    """

    sharding: Sharding
    team: Team
    has_gradient: bool
    shares_scales: bool = False
    total: Tensor | None = None
    present: Tensor | None = None
    scales: list[Tensor] = field(default_factory=list)
    mean_scale: Tensor | None = None

    @property
    def axes(self) -> Axes:
        """Which dimensions are rows and columns."""
        return axes_of(self.layout, len(self.sharding.shape))

    @property
    def parts(self) -> list[Rows]:
        """The rows of each logical matrix."""
        return rows_of_parts(self.sharding.shape, self.layout, self.split)

    @property
    def grids(self) -> list[Grid]:
        """The division of each logical matrix over the mesh."""
        return [grid_of(self.sharding, self.axes, part) for part in self.parts]

    def views(self, tensor: Tensor) -> list[Tensor]:
        """This rank's blocks, possibly empty, of the logical matrices of a local tensor; a vector is one block.

        Blocks are views, except those of interleaved parts, which are copies.
        """
        if self.layout == "vector":
            return [tensor]
        (whole,) = matrices(tensor, self.layout)
        return [take_rows(whole, rows) for rows in self._local_rows()]

    def fill(self, tensor: Tensor, blocks: Sequence[Tensor]) -> None:
        """Write blocks, as :meth:`views` lists them, to a local tensor."""
        if self.layout == "vector":
            (block,) = blocks
            tensor.copy_(block)
            return
        (whole,) = matrices(tensor, self.layout)
        for rows, block in zip(self._local_rows(), blocks, strict=True):
            if len(rows) <= 1:
                take_rows(whole, rows).copy_(block)
            else:
                whole.index_copy_(-2, _indices(rows, whole.device), block.to(whole.dtype))

    def _local_rows(self) -> list[Intervals]:
        return [local_rows(self.sharding, self.axes, part, self.team.member) for part in self.parts]

    def is_whole(self) -> bool:
        """True if every matrix, or the vector, of which this rank has entries is entirely here."""
        return not any(map(self.sharding.divides, self.axes.rows + self.axes.columns))

    def is_alone(self) -> bool:
        """True if every matrix here is whole and not replicated on another rank."""
        return self.is_whole() and self.sharding.replicas == 1

    def is_served_locally(self, rule: Rule) -> bool:
        """True if the rule's step needs no other rank after screening."""
        if rule.vector:
            return self.is_whole() or (rule.clip is None and rule.shrink is None)
        if self.is_whole():
            # Replicas divide whole-matrix work among themselves, which is worth a message.
            return not rule.is_dense or self.sharding.replicas == 1
        plain = not rule.is_dense and rule.operator is None and rule.shrink is None and rule.scale == "none"
        plain = plain and not rule.direction.corrects
        # Split sizes refer to the whole matrix and do not fit a shard.
        return plain and self.split is None

    def root_sums(self, tensor: Tensor) -> list[Tensor]:
        """The sum of √|y| over this rank's entries of every logical matrix, up to a constant; one for each expert.

        Summed over ranks, they give the entry scales.
        """
        return self.sums(tensor, lambda view: entry_scale(view).double().sqrt() * math.prod(view.shape[-2:]))

    def sums(self, tensor: Tensor, of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """This rank's terms of a sum over the entries of every logical matrix; one for each expert.

        Args:
            of: block of a matrix, or of a stack or vector -> the sum over its entries.
        """
        sums = []
        for view in self.views(tensor):
            # One sum over all dimensions of a vector.
            found = of(view.reshape(-1) if self.layout == "vector" else view)
            if self.layout != "vector" and self.axes.stack is not None:
                whole = found.new_zeros(self.sharding.shape[self.axes.stack])
                put(whole, [self.sharding.region(self.team.member)[self.axes.stack]], found)
                found = whole
            # Count each shard once, not once per replica.
            sums.append(found if self.sharding.replica(self.team.member) == 0 else torch.zeros_like(found))
        return sums

    def of_rank(self, total: Tensor) -> Tensor:
        """The part of a total over all ranks, a number for each expert of a stack, that belongs to this rank."""
        if self.layout == "vector" or self.axes.stack is None:
            return total
        return take(total, [self.sharding.region(self.team.member)[self.axes.stack]])

    def set_scales(self, sums: Sequence[Tensor]) -> None:
        """Set the entry scales from the totals of :meth:`root_sums` over all ranks."""
        self.scales, everywhere = [], []
        if self.layout == "vector":
            sizes = [math.prod(self.sharding.shape)]
        else:
            sizes = [math.prod(shape[-2:]) for shape in matrix_shapes(self.sharding.shape, self.layout, self.split)]
        for total, size in zip(sums, sizes, strict=True):
            scale = (total / max(size, 1)).square().to(torch.promote_types(self.grad.dtype, torch.float32))
            everywhere.append(scale.reshape(-1))
            self.scales.append(scale.reshape(()) if self.axes.stack is None else self.of_rank(scale))
        self.mean_scale = torch.cat(everywhere).mean()

    def shrunk(self, tensor: Tensor, shrink: Shrink) -> Tensor:
        """A new local tensor, with entries shrunk that are large against the scales."""
        result = torch.empty_like(tensor)
        blocks = zip(self.views(tensor), self.scales, strict=True)
        self.fill(result, [smooth_shrink(block, shrink.factor * scale, form=shrink.form) for block, scale in blocks])
        return result


AnyShard = TypeVar("AnyShard", bound=ShardedEntry)


def sharded_entry(
    parameter: DTensor,
    group: Mapping[str, Any],
    position: tuple[int, int],
    name: str,
    state: Mapping[str, Any],
    rule: Rule,
) -> ShardedEntry:
    """The entry of a DTensor parameter. Without a gradient on this rank, its ``grad`` is zeros."""
    _, layout = role_and_layout(group, parameter)
    local, found = parameter.to_local(), local_gradient(parameter, name)
    # torch allows gradients of another dtype than the parameter's; all ranks must use the same.
    dtype = getattr(parameter, "grad_dtype", None)
    entry = ShardedEntry(
        parameter=local,
        grad=torch.zeros_like(local, dtype=dtype) if found is None else found,
        state={key: value.to_local() if is_dtensor(value) else value for key, value in state.items()},
        layout=layout,
        split=group.get("split"),
        rule=rule,
        position=position,
        sharding=sharding_of(parameter, name),
        team=team_of(parameter.device_mesh),
        has_gradient=found is not None,
    )
    entry.shares_scales = rule.shrink_gradient is not None and not entry.is_served_locally(rule)
    return entry


def rows_of_parts(shape: Sequence[int], layout: Layout, split: Split | None) -> list[Rows]:
    """The rows of each logical matrix of a parameter with this global shape."""
    sizes = [size[-2] for size in matrix_shapes(shape, layout, split)]
    period = None
    if split is not None:
        in_period, interleaved = sizes_of(split)
        sizes, period = list(in_period), sum(in_period) if interleaved else None
    ends = list(itertools.accumulate(sizes))
    return [Rows(start, stop, period) for start, stop in zip([0, *ends], ends, strict=False)]


def take_rows(whole: Tensor, rows: Intervals, dim: int = -2) -> Tensor:
    """Select rows; a view if they are one interval, else a copy."""
    if len(rows) <= 1:
        start, stop = rows[0] if rows else (0, 0)
        return whole.narrow(dim, start, stop - start)
    return whole.index_select(dim, _indices(rows, whole.device))


@cache
def _indices(rows: Intervals, device: torch.device) -> Tensor:
    return torch.tensor([index for start, stop in rows for index in range(start, stop)], device=device)


def axes_of(layout: Layout, dimensions: int) -> Axes:
    """The dimensions that a layout uses as rows, columns and stack."""
    found = {
        "matrix": Axes((0,), (1,)),
        "transposed": Axes((1,), (0,)),
        "stack": Axes((1,), (2,), 0),
        "transposed_stack": Axes((2,), (1,), 0),
    }
    return found.get(layout) or Axes((0,), tuple(range(1, dimensions)))


def sharded_state(parameter: DTensor, layout: Layout, whole: Tensor) -> DTensor:
    """An operator's state as a DTensor.

    Args:
        whole: the state of one matrix, the same for every matrix of a stack: a basis (n, k), whose rows are sharded
            like the matrix's columns; or numbers (parts,), replicated or sharded like the parameter's experts.
    """
    from torch.distributed.tensor import Replicate, Shard

    mesh, axes = parameter.device_mesh, axes_of(layout, parameter.ndim)
    sharding, member = sharding_of(parameter, ""), team_of(parameter.device_mesh).member
    placements: list[Placement]
    splits = zip(parameter.placements, sharding.splits, strict=True)
    of_experts = [p if split is not None and split.dim == axes.stack else None for p, split in splits]
    if whole.ndim == 2:
        basis = basis_sharding(sharding, axes, whole.shape[-1])
        shape, region = basis.shape, basis.region(member)
        of_rows = [Replicate() if split is None else Shard(split.dim) for split in basis.splits]
        placements = [own or other for own, other in zip(of_experts, of_rows, strict=True)]
    else:
        stack = () if axes.stack is None else (axes.stack,)
        shape, region = (
            (*(sharding.shape[dim] for dim in stack), *whole.shape),
            tuple(sharding.region(member)[dim] for dim in stack),
        )
        placements = [own or Replicate() for own in of_experts]
    local = take(whole.expand(shape), region).clone(memory_format=torch.contiguous_format)
    return dtensor_of(local, torch.empty(shape, device="meta"), mesh, placements)


def local_gradient(parameter: DTensor, name: str) -> Tensor | None:
    """This rank's shard of a parameter's gradient, or None."""
    grad = parameter.grad
    if grad is None:
        return None
    if not is_dtensor(grad):
        raise ValueError(f"the gradient of {name!r} is a {type(grad).__name__}: expected a DTensor like the parameter")
    if grad.placements != parameter.placements or grad.device_mesh != parameter.device_mesh:
        grad = grad.redistribute(parameter.device_mesh, parameter.placements)
    return grad.to_local()


def laid_like(parameter: DTensor, local: Tensor) -> DTensor:
    """This rank's shard as a DTensor with the parameter's mesh and placements."""
    return dtensor_of(local, parameter, parameter.device_mesh, parameter.placements)


def by_team(entries: Iterable[AnyShard]) -> list[tuple[Team, list[AnyShard]]]:
    """Group entries by their team of ranks, in order."""
    return list(grouped(entries, lambda entry: entry.team).items())
