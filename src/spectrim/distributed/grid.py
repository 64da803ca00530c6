"""Which rows and columns of a matrix, and which part of its spike's basis, each member of a mesh holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Literal, NamedTuple

from spectrim.distributed.intervals import Intervals, chunk, count, flattened, joined, overlaps
from spectrim.distributed.sharding import Sharding, Split

__all__ = ["Axes", "Grid", "Rows", "Share", "basis_sharding", "grid_of", "local_rows"]

#: Ways to divide a matrix: its rows or columns as members hold them, or the rows of its spike's basis or left vectors.
Share = Literal["rows", "columns", "basis", "frame"]


@dataclass(frozen=True)
class Axes:
    """The dimensions of a tensor that are rows, columns, and the stack of matrices."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    stack: int | None = None


class Rows(NamedTuple):
    """The rows ``[start, stop)`` of one part of a tensor, repeated with a period if the parts are interleaved."""

    start: int
    stop: int
    period: int | None = None

    def runs(self, total: int) -> Intervals:
        """The rows as intervals, for a tensor of ``total`` rows."""
        begins = [0] if self.period is None else range(0, total, self.period)
        return tuple((begin + self.start, begin + self.stop) for begin in begins)


@dataclass(frozen=True)
class Grid:
    """The division of a logical matrix (m, n), or a stack (E, m, n), over a mesh.

    The members that hold the same matrices of a stack in the same replica form a family.

    Attributes:
        sharding: the sharding of the tensor.
        axes: the dimensions that are rows and columns.
        part: the matrix's rows in the tensor.
    """

    sharding: Sharding
    axes: Axes
    part: Rows

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return count(self._part_runs), math.prod(self.sharding.shape[dim] for dim in self.axes.columns)

    @property
    def depth(self) -> int | None:
        """E, or None if there is no stack."""
        return None if self.axes.stack is None else self.sharding.shape[self.axes.stack]

    def rows(self, member: int) -> Intervals:
        """The rows that a member holds."""
        pairs = overlaps(_held(self.sharding, self.axes.rows, member), self._part_runs)
        return joined([(place.start, place.stop) for _, place in pairs])

    def columns(self, member: int) -> Intervals:
        """The columns that a member holds."""
        return _held(self.sharding, self.axes.columns, member)

    def stack(self, member: int) -> Intervals:
        """The matrices of which a member holds entries."""
        return () if self.axes.stack is None else self.sharding.region(member)[self.axes.stack]

    def basis(self, member: int) -> Intervals:
        """The rows of the n x k basis that a member keeps; disjoint within a family."""
        return self._basis.region(member)[-2]

    def frame(self, member: int) -> Intervals:
        """The rows of the m x k left vectors that a member computes.

        Members of a family that hold the same rows divide them evenly."""
        same = self.sharding.varied(member, self.axes.columns)
        return chunk(self.rows(member), len(same), same.index(member))

    def family(self, member: int) -> list[int]:
        """The members of a member's family, in order, including itself."""
        return self.sharding.varied(member, self.axes.rows + self.axes.columns)

    def moves(self, have: Share, want: Share) -> bool:
        """True if the two shares differ for any member, so that a message is needed."""
        key = (have, want)
        if key not in self._moves:
            share, wanted = self.share(have), self.share(want)
            self._moves[key] = any(share(member) != wanted(member) for member in range(self.sharding.members))
        return self._moves[key]

    def share(self, which: Share) -> Callable[[int], Intervals]:
        """The function from member to indices for one way to divide the matrix."""
        function: Callable[[int], Intervals] = getattr(self, which)
        return function

    @cached_property
    def _part_runs(self) -> Intervals:
        return self.part.runs(math.prod(self.sharding.shape[dim] for dim in self.axes.rows))

    @cached_property
    def _basis(self) -> Sharding:
        return basis_sharding(self.sharding, self.axes, 1)

    @cached_property
    def _moves(self) -> dict[tuple[Share, Share], bool]:
        return {}


def basis_sharding(sharding: Sharding, axes: Axes, rank: int) -> Sharding:
    """The sharding of the (E, n, k) basis: its rows are split over all mesh dimensions that split rows or columns, and
    its experts as the parameter's."""
    inputs = math.prod(sharding.shape[dim] for dim in axes.columns)
    shape = (inputs, rank) if axes.stack is None else (sharding.shape[axes.stack], inputs, rank)

    def moved(split: Split | None) -> Split | None:
        if split is None:
            return None
        return replace(split, dim=0) if split.dim == axes.stack else Split(len(shape) - 2)

    return replace(sharding, shape=shape, splits=tuple(map(moved, sharding.splits)))


@cache
def grid_of(sharding: Sharding, axes: Axes, part: Rows) -> Grid:
    """The grid of some rows; cached, since a grid caches its results."""
    return Grid(sharding, axes, part)


@cache
def local_rows(sharding: Sharding, axes: Axes, part: Rows, member: int) -> Intervals:
    """The positions, among the rows that a member holds, of the rows of a part."""
    whole = part.runs(math.prod(sharding.shape[dim] for dim in axes.rows))
    mine = [ours for ours, _ in overlaps(_held(sharding, axes.rows, member), whole)]
    return joined([(place.start, place.stop) for place in mine])


def _held(sharding: Sharding, dims: Sequence[int], member: int) -> Intervals:
    """The indices that a member holds along flattened dimensions."""
    region = sharding.region(member)
    return flattened([region[dim] for dim in dims], [sharding.shape[dim] for dim in dims])
