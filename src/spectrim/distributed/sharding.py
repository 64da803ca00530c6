"""Which part of a tensor each rank of a mesh holds, computed from placements.

This needs no process group, so it can be tested in one process. The members of a mesh are numbered in row-major order
of their coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

from spectrim.distributed.intervals import Intervals, chunk, joined

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement

__all__ = ["Sharding", "Split", "sharding_from", "sharding_of"]


@dataclass(frozen=True)
class Split:
    """A mesh dimension that splits a dimension of the tensor.

    ``factor`` is 1 for plain shards. For strided shards, which FSDP2 makes over tensor parallelism, later mesh
    dimensions have split the dimension into ``factor`` parts, and this mesh dimension splits each part again.
    """

    dim: int
    factor: int = 1


@dataclass(frozen=True)
class Sharding:
    """The division of a tensor over a mesh.

    Attributes:
        shape: shape of the whole tensor.
        mesh_shape: shape of the mesh.
        splits: for each mesh dimension the split of the tensor, or None if it holds replicas.
    """

    shape: tuple[int, ...]
    mesh_shape: tuple[int, ...]
    splits: tuple[Split | None, ...]

    @property
    def members(self) -> int:
        """The number of ranks of the mesh."""
        return math.prod(self.mesh_shape)

    @property
    def replicas(self) -> int:
        """The number of ranks that hold each entry."""
        pairs = zip(self.mesh_shape, self.splits, strict=True)
        return math.prod(size for size, split in pairs if split is None)

    def divides(self, dim: int) -> bool:
        """True if a dimension is split over more than one rank."""
        pairs = zip(self.mesh_shape, self.splits, strict=True)
        return any(split is not None and split.dim == dim and size > 1 for size, split in pairs)

    def region(self, member: int) -> tuple[Intervals, ...]:
        """The indices that a member holds along each dimension."""
        found = self._regions.get(member)
        if found is None:
            found = self._regions[member] = self._region(member)
        return found

    def coordinate(self, member: int) -> tuple[int, ...]:
        """A member's coordinates in the mesh."""
        place = []
        for size in reversed(self.mesh_shape):
            member, last = divmod(member, size)
            place.append(last)
        return tuple(reversed(place))

    def replica(self, member: int) -> int:
        """The number of a member's replica. The members of one replica together hold the tensor once."""
        return self._number(member, replicated=True)

    def shard(self, member: int) -> int:
        """The number of a member's shard, equal for members that hold the same shard."""
        return self._number(member, replicated=False)

    def varied(self, member: int, dims: Collection[int | None]) -> list[int]:
        """The members, in order, that differ from a member only along mesh dimensions that split one of ``dims``.

        None in ``dims`` stands for mesh dimensions with replicas. The member itself is included."""
        found = [0]
        for place, size, split in zip(self.coordinate(member), self.mesh_shape, self.splits, strict=True):
            varies = (None if split is None else split.dim) in dims
            places = range(size) if varies else (place,)
            found = [number * size + each for number in found for each in places]
        return found

    def _number(self, member: int, *, replicated: bool) -> int:
        number = 0
        for place, size, split in zip(self.coordinate(member), self.mesh_shape, self.splits, strict=True):
            if (split is None) == replicated:
                number = number * size + place
        return number

    @cached_property
    def _regions(self) -> dict[int, tuple[Intervals, ...]]:
        return {}

    def _region(self, member: int) -> tuple[Intervals, ...]:
        region: list[Intervals] = [((0, size),) if size else () for size in self.shape]
        axes = list(zip(self.splits, self.mesh_shape, self.coordinate(member), strict=True))
        # Plain splits from the left, then strided ones from the right.
        plain = [axis for axis in axes if axis[0] and axis[0].factor == 1]
        strided = [axis for axis in axes if axis[0] and axis[0].factor > 1]
        for split, size, place in plain + strided[::-1]:
            assert split is not None
            region[split.dim] = chunk(region[split.dim], size, place)
        return tuple(region)


def sharding_of(tensor: DTensor, name: str) -> Sharding:
    """The sharding of a DTensor.

    Raises:
        ValueError: a placement is not supported; the message has the parameter's name.
    """
    return sharding_from(tuple(tensor.shape), tuple(tensor.device_mesh.shape), tuple(tensor.placements), name)


def sharding_from(
    shape: tuple[int, ...], mesh_shape: tuple[int, ...], placements: tuple[Placement, ...], name: str
) -> Sharding:
    """The sharding for placements; :func:`sharding_of` without a tensor."""
    try:
        return _sharding_from(shape, mesh_shape, placements)
    except ValueError as error:
        raise ValueError(f"the layout of parameter {name!r}, {tuple(placements)}, is not supported: {error}") from None


@cache
def _sharding_from(shape: tuple[int, ...], mesh_shape: tuple[int, ...], placements: tuple[Placement, ...]) -> Sharding:
    from torch.distributed.tensor import Replicate, Shard

    splits: list[Split | None] = []
    for placement in placements:
        if isinstance(placement, Replicate):
            splits.append(None)
        elif type(placement) is Shard:
            splits.append(Split(placement.dim % len(shape)))
        elif type(placement).__name__ == "_StridedShard":
            splits.append(Split(placement.dim % len(shape), int(placement.split_factor)))  # type: ignore[attr-defined]
        else:
            raise ValueError(f"{placement} is not supported: expected Shard or Replicate")
    sharding = Sharding(shape, mesh_shape, tuple(splits))
    _check_strides(sharding)
    return sharding


def _check_strides(sharding: Sharding) -> None:
    """Check that strided shards agree with later mesh dimensions, and split evenly.

    FSDP2 splits from the right and DTensor reads from the left; with uneven splits they disagree about the rows."""
    for axis, split in enumerate(sharding.splits):
        if split is None or split.factor == 1:
            continue
        later = [
            size
            for size, other in zip(sharding.mesh_shape[axis + 1 :], sharding.splits[axis + 1 :], strict=True)
            if other is not None and other.dim == split.dim
        ]
        if math.prod(later) != split.factor:
            raise ValueError(
                f"split_factor={split.factor}: expected {math.prod(later)}, the shards of later dimensions"
            )
    if any(split is not None and split.factor > 1 for split in sharding.splits):
        for member in range(sharding.members):
            if sharding.region(member) != _read_from_the_left(sharding, sharding.coordinate(member)):
                raise ValueError(
                    f"shape {sharding.shape} on a mesh of {sharding.mesh_shape} splits so unevenly that FSDP2 and "
                    f"DTensor disagree about the shards"
                )


def _read_from_the_left(sharding: Sharding, coordinate: tuple[int, ...]) -> tuple[Intervals, ...]:
    """The region as DTensor defines it: a strided shard is one part of each of its ``factor`` chunks."""
    region: list[Intervals] = [((0, size),) if size else () for size in sharding.shape]
    for place, size, split in zip(coordinate, sharding.mesh_shape, sharding.splits, strict=True):
        if split is None:
            continue
        whole = region[split.dim]
        parts = [chunk(chunk(whole, split.factor, part), size, place) for part in range(split.factor)]
        region[split.dim] = tuple(run for part in parts for run in part)
    return tuple(joined(runs) for runs in region)
