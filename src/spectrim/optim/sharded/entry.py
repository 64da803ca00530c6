"""Parameters that are DTensors, as entries of local tensors.

An entry of a sharded parameter holds this rank's shard of everything, so whatever works entry by entry runs as in one
process. Relies on :mod:`spectrim.distributed`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from spectrim.distributed.collectives import Team, team_of
from spectrim.distributed.dtensor import is_dtensor
from spectrim.distributed.grid import Axes, Grid, Rows, basis_sharding, grid_of, local_rows
from spectrim.distributed.intervals import Intervals, put, take
from spectrim.distributed.sharding import Sharding, sharding_of
from spectrim.operators import ShrinkForm, entry_scale, smooth_shrink
from spectrim.optim.grouping.layout import Layout, Split, matrices, matrix_shapes, sizes_of
from spectrim.optim.rules.rule import Rule
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
    "local_state",
    "rows_of_parts",
    "sharded_basis",
    "sharded_entry",
    "sharded_numbers",
    "take_rows",
]


@dataclass(kw_only=True, eq=False)
class ShardedEntry(Entry):
    """This rank's shard of a parameter. All tensors are local ones, ``state`` among them.

    Attributes:
        has_gradient: on this rank; where not, ``grad`` is zeros.
        shares_scales: entries are shrunk by scales that no rank knows by itself.
        total: after screening, what all ranks together know of the gradient: NaN where it is not finite, zero where it
            is zero; see :func:`~spectrim.optim.screening.shard_screening.screen_shards`.
        present: after screening, whether any rank has a gradient.
        scales: of each logical matrix, as :meth:`views` lists them, after screening; :attr:`mean_scale` over all ranks.
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
        """How each logical matrix lies on the mesh."""
        return [grid_of(self.sharding, self.axes, part) for part in self.parts]

    def views(self, tensor: Tensor) -> list[Tensor]:
        """This rank's blocks of the logical matrices of a local tensor, some of which may be empty; a vector is one.

        Views, but for interleaved parts, which are copies.
        """
        if self.layout == "vector":
            return [tensor]
        (whole,) = matrices(tensor, self.layout)
        return [take_rows(whole, rows) for rows in self._local_rows()]

    def fill(self, tensor: Tensor, blocks: Sequence[Tensor]) -> None:
        """Write all of :meth:`views` of a local tensor."""
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
        """Whether every matrix that this rank has a part of is all here; a vector as a whole."""
        if self.layout == "vector":
            return not any(map(self.sharding.divides, range(len(self.sharding.shape))))
        return not any(map(self.sharding.divides, self.axes.rows + self.axes.columns))

    def is_alone(self) -> bool:
        """True if every matrix is whole here and held by no other rank: nobody has to be asked, no work is shared."""
        return self.is_whole() and self.sharding.replicas == 1

    def is_served_locally(self, rule: Rule) -> bool:
        """True if the step of a rule needs nothing from other ranks, once the gradient is screened."""
        if rule.vector:
            return self.is_whole() or (rule.clip is None and rule.shrink is None)
        if self.is_whole():
            # Replicas share work that is worth a message.
            return not rule.is_dense or self.sharding.replicas == 1
        plain = not rule.is_dense and rule.operator is None and rule.shrink is None and rule.scale == "none"
        # The sizes of a split are those of the whole, and do not fit a part.
        return plain and self.split is None

    def root_sums(self, tensor: Tensor) -> list[Tensor]:
        """The sum of √|y| over this rank's part of every logical matrix, up to one factor, for all E of a stack."""
        sums = []
        for view in self.views(tensor):
            if self.layout == "vector":
                # Of any number of dimensions, and one unit.
                view = view.reshape(-1)
            count_here = math.prod(view.shape[-2:])
            found = entry_scale(view).double().sqrt() * count_here
            if self.layout != "vector" and self.axes.stack is not None:
                whole = found.new_zeros(self.sharding.shape[self.axes.stack])
                put(whole, [self.sharding.region(self.team.member)[self.axes.stack]], found)
                found = whole
            # Replicas would count twice.
            sums.append(found if self.sharding.replica(self.team.member) == 0 else torch.zeros_like(found))
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
                scale = take(scale, [self.sharding.region(self.team.member)[self.axes.stack]])
            self.scales.append(scale)
        self.mean_scale = torch.cat(everywhere).mean()

    def shrunk(self, tensor: Tensor, factor: float, form: ShrinkForm) -> Tensor:
        """A local tensor whose entries are shrunk against the scales."""
        result = torch.empty_like(tensor)
        blocks = zip(self.views(tensor), self.scales, strict=True)
        self.fill(result, [smooth_shrink(block, factor * scale, form=form) for block, scale in blocks])
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
    """The entry of a parameter of a group; the gradient is zeros where this rank has none."""
    role, layout = role_and_layout(group, parameter)
    local, found = parameter.to_local(), local_gradient(parameter, name)
    # Of the dtype that gradients have on other ranks, which torch lets differ from the parameter's.
    dtype = getattr(parameter, "grad_dtype", None)
    entry = ShardedEntry(
        parameter=local,
        grad=torch.zeros_like(local, dtype=dtype) if found is None else found,
        state=local_state(state),
        role=role,
        layout=layout,
        split=group.get("split"),
        rule=rule,
        position=position,
        sharding=sharding_of(parameter, name),
        team=team_of(parameter.device_mesh),
        has_gradient=found is not None,
    )
    entry.shares_scales = rule.shrinks_gradient and not entry.is_served_locally(rule)
    return entry


def rows_of_parts(shape: Sequence[int], layout: Layout, split: Split | None) -> list[Rows]:
    """The rows of each logical matrix of a parameter of this whole shape."""
    sizes = [size[-2] for size in matrix_shapes(shape, layout, split)]
    period = None
    if split is not None:
        in_period, interleaved = sizes_of(split)
        sizes, period = list(in_period), sum(in_period) if interleaved else None
    ends = list(itertools.accumulate(sizes))
    return [Rows(start, stop, period) for start, stop in zip([0, *ends], ends, strict=False)]


def take_rows(whole: Tensor, rows: Intervals, dim: int = -2) -> Tensor:
    """Some rows: a view where they are one run."""
    if len(rows) <= 1:
        start, stop = rows[0] if rows else (0, 0)
        return whole.narrow(dim, start, stop - start)
    return whole.index_select(dim, _indices(rows, whole.device))


@cache
def _indices(rows: Intervals, device: torch.device) -> Tensor:
    return torch.tensor([index for start, stop in rows for index in range(start, stop)], device=device)


def axes_of(layout: Layout, dimensions: int) -> Axes:
    """Which dimensions of a parameter its layout calls rows, columns and stack."""
    found = {
        "matrix": Axes((0,), (1,)),
        "transposed": Axes((1,), (0,)),
        "stack": Axes((1,), (2,), 0),
        "transposed_stack": Axes((2,), (1,), 0),
    }
    return found.get(layout) or Axes((0,), tuple(range(1, dimensions)))


def sharded_basis(parameter: DTensor, layout: Layout, whole: Tensor) -> Tensor:
    """A DTensor of an operator's basis (..., n, k), of which this rank keeps the rows that belong to its inputs.

    Args:
        whole: (n, k), the basis of one matrix; every matrix of a stack has the same.
    """
    mesh, axes = parameter.device_mesh, axes_of(layout, parameter.ndim)
    kept = basis_sharding(sharding_of(parameter, ""), axes, whole.shape[-1])
    local = take(whole.expand(kept.shape), kept.region(team_of(mesh).member))
    local = local.clone(memory_format=torch.contiguous_format)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [Replicate() if split is None else Shard(split.dim) for split in kept.splits]
    stride = torch.empty(kept.shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(kept.shape), stride=stride)


def sharded_numbers(parameter: DTensor, layout: Layout, whole: Tensor) -> Tensor:
    """A DTensor of some numbers for every matrix: all of them on every rank, or those of the experts that are here.

    Args:
        whole: (parts,), the numbers of one matrix; every matrix of a stack has the same.
    """
    mesh, axes = parameter.device_mesh, axes_of(layout, parameter.ndim)
    sharding = sharding_of(parameter, "")
    from torch.distributed.tensor import DTensor, Replicate

    placements: list[Placement] = [Replicate()] * mesh.ndim
    if axes.stack is not None:
        of_experts = zip(parameter.placements, sharding.splits, strict=True)
        placements = [p if split is not None and split.dim == axes.stack else Replicate() for p, split in of_experts]
        whole = whole.expand(sharding.shape[axes.stack], *whole.shape)
    local = take(whole, [sharding.region(team_of(mesh).member)[axes.stack]]) if axes.stack is not None else whole
    shape = whole.shape
    local = local.clone(memory_format=torch.contiguous_format)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


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
    """A DTensor of a parameter's layout around this rank's shard."""
    mesh, placements = parameter.device_mesh, parameter.placements
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def local_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """State whose DTensors are replaced by their local tensors, which share their memory."""
    return {key: value.to_local() if is_dtensor(value) else value for key, value in state.items()}


def by_team(entries: Iterable[AnyShard]) -> list[tuple[Team, list[AnyShard]]]:
    """Entries with those of the same ranks, in order."""
    found: dict[Team, list[AnyShard]] = {}
    for entry in entries:
        found.setdefault(entry.team, []).append(entry)
    return list(found.items())
