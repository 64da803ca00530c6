"""How a matrix, or a stack of them, lies on a mesh: who holds which rows and columns, and who keeps which part of the
spike's basis. Pure descriptions, made from a sharding alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import NamedTuple

from spectrim.distributed.runs import Runs, chunk, count, flattened, joined, overlaps
from spectrim.distributed.sharding import Sharding, Split

__all__ = ["Axes", "Grid", "Rows", "basis_sharding", "grid_of", "local_rows"]


@dataclass(frozen=True)
class Axes:
    """Which dimensions of a tensor are rows, columns, and the stack of its matrices."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    stack: int | None = None


class Rows(NamedTuple):
    """The rows of one part of a tensor: from start up to stop, and again in every period, where there is one."""

    start: int
    stop: int
    period: int | None = None

    def runs(self, total: int) -> Runs:
        """The rows, of so many in all."""
        begins = [0] if self.period is None else range(0, total, self.period)
        return tuple((begin + self.start, begin + self.stop) for begin in begins)


@dataclass(frozen=True)
class Grid:
    """One matrix m x n, or a stack of E, on a mesh; each tuple has one item for every member.

    A family are the members that hold the same matrices of a stack, in the same replica.

    Attributes:
        shape: (m, n).
        depth: E, or None where there is no stack.
        rows, columns, stack: what a member holds.
        basis: the columns whose part of the n x k basis a member keeps. Within a family they are disjoint.
        replica: which replica a member belongs to.
    """

    shape: tuple[int, int]
    depth: int | None
    rows: tuple[Runs, ...]
    columns: tuple[Runs, ...]
    stack: tuple[Runs, ...]
    basis: tuple[Runs, ...]
    replica: tuple[int, ...]

    @cached_property
    def family(self) -> tuple[tuple[int, Runs], ...]:
        """For every member, its family."""
        return tuple(zip(self.replica, self.stack, strict=True))

    @cached_property
    def frame(self) -> tuple[Runs, ...]:
        """The rows whose part of the m x k left vectors a member works out: those that it holds, shared evenly with
        the members of its family that hold the same."""
        sharers: dict[object, list[int]] = {}
        for member, key in enumerate(zip(self.family, self.rows, strict=True)):
            sharers.setdefault(key, []).append(member)
        return tuple(
            chunk(rows, len(same := sharers[family, rows]), same.index(member))
            for member, (family, rows) in enumerate(zip(self.family, self.rows, strict=True))
        )

    @cached_property
    def peers(self) -> tuple[tuple[int, ...], ...]:
        """For every member those of its family, itself among them."""
        members: dict[object, list[int]] = {}
        for member, family in enumerate(self.family):
            members.setdefault(family, []).append(member)
        return tuple(tuple(members[family]) for family in self.family)


def basis_sharding(sharding: Sharding, axes: Axes, rank: int) -> Sharding:
    """The sharding of the (E,) n x k basis: its rows over every mesh dimension that splits rows or columns."""
    inputs = math.prod(sharding.shape[dim] for dim in axes.columns)
    shape = (inputs, rank) if axes.stack is None else (sharding.shape[axes.stack], inputs, rank)

    def moved(split: Split | None) -> Split | None:
        if split is None:
            return None
        return Split(0) if split.dim == axes.stack else Split(len(shape) - 2)

    return replace(sharding, shape=shape, splits=tuple(map(moved, sharding.splits)))


@cache
def grid_of(sharding: Sharding, axes: Axes, part: Rows) -> Grid:
    """The grid of the matrix that the rows of one part of a tensor make."""
    rows_of_part = part.runs(math.prod(sharding.shape[dim] for dim in axes.rows))
    kept = basis_sharding(sharding, axes, 1)

    def places(member: int) -> Runs:
        pairs = [theirs for _, theirs in overlaps(_held(sharding, axes.rows, member), rows_of_part)]
        return joined([(place.start, place.stop) for place in pairs])

    members = range(sharding.members)
    return Grid(
        shape=(count(rows_of_part), kept.shape[-2]),
        depth=None if axes.stack is None else sharding.shape[axes.stack],
        rows=tuple(map(places, members)),
        columns=tuple(_held(sharding, axes.columns, member) for member in members),
        stack=tuple(() if axes.stack is None else sharding.regions[member][axes.stack] for member in members),
        basis=tuple(kept.regions[member][-2] for member in members),
        replica=sharding.replica,
    )


@cache
def local_rows(sharding: Sharding, axes: Axes, part: Rows, member: int) -> Runs:
    """Which of the rows that a member holds are of a part."""
    whole = part.runs(math.prod(sharding.shape[dim] for dim in axes.rows))
    mine = [ours for ours, _ in overlaps(_held(sharding, axes.rows, member), whole)]
    return joined([(place.start, place.stop) for place in mine])


def _held(sharding: Sharding, dims: Sequence[int], member: int) -> Runs:
    """What a member holds along the joined dimensions."""
    region = sharding.regions[member]
    return flattened([region[dim] for dim in dims], [sharding.shape[dim] for dim in dims])
