"""Tracks and shapes the spikes of sharded matrices without gathering the matrices.

The formulas are those of :mod:`spectrim.operators.spike`. For a matrix of blocks M_ij, one on each rank, Y = MV and
W = MᵀU are sums of local products over the ranks of a row or column of blocks, so only k columns are exchanged. All
matrices of a bucket share messages. Ranks that compute the same numbers get the same bits: small sums go over the
whole team, and long sums are taken in the order of members.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectrim.distributed.collectives import Team
from spectrim.distributed.copies import Copy
from spectrim.distributed.grid import Grid, Share
from spectrim.distributed.intervals import Intervals, count, overlaps, put, take
from spectrim.distributed.routes import Route, RoutePlanner
from spectrim.kernels.spike import DEAD_DIRECTION, EMPTY_TAIL, PLAIN_TAIL
from spectrim.operators._product import product
from spectrim.operators._stack import energy, reading_is_free

__all__ = ["Block", "Correction", "plan_rows", "shape_spikes"]

#: Added to the unit diagonal of a Gram matrix so that its Cholesky factor exists; far below float32's resolution.
SHIFT = 1e-14

#: A column is dependent if less than this share of it is orthogonal to the columns before it.
DEPENDENT = 5e-7


@dataclass(kw_only=True, eq=False)
class Block:
    """This rank's part of a matrix or stack.

    Attributes:
        grid: the division of the matrix over the mesh.
        M: (..., rows, columns), the local block.
        V: (..., kept rows, k), the local part of the basis, which is replaced by the new one.
    """

    grid: Grid
    M: Tensor
    V: Tensor


class Correction(NamedTuple):
    """The factors of the shaped block O = M + left rightᵀ, and the norm (...) of the whole O."""

    left: Tensor
    right: Tensor
    norm: Tensor


def shape_spikes(team: Team, blocks: Sequence[Block], *, steps: int) -> list[Correction]:
    """Track the spikes of matrices by power steps, and shrink them to the scale of their tails.

    Args:
        team: all members call this with their blocks of the same matrices.
        blocks: of one dtype and device.
        steps: power steps, at least 1.
    """
    work = _SpikeStep(team, blocks)
    for _ in range(steps):
        work.power_step()
    return work.corrections()


class _SpikeStep:
    """The tensors of one call, in lists with one item for every block."""

    def __init__(self, team: Team, blocks: Sequence[Block]) -> None:
        self.team, self.blocks = team, blocks
        self.U: list[Tensor] = []  # rows of this block
        self.W: list[Tensor] = []  # kept columns
        self.lengths: list[Tensor] = []

    def power_step(self) -> None:
        """U ← orth(M V);  W ← MᵀU;  V ← W / its column norms."""
        wanted = self._gathered([block.V for block in self.blocks], "basis", "columns")
        partial = [product(block.M, V) for block, V in zip(self.blocks, wanted, strict=True)]
        Q = self._orthonormal(self._summed(partial, "rows", "frame"))
        self.U = self._gathered(Q, "frame", "rows")
        partial = [product(block.M.mT, U) for block, U in zip(self.blocks, self.U, strict=True)]
        self.W = self._summed(partial, "columns", "basis")
        squares = self._totals([W.double().square().sum(-2) for W in self.W])
        self.lengths = [square.sqrt() for square in squares]
        for block, W, length in zip(self.blocks, self.W, self.lengths, strict=True):
            alive = (length > DEAD_DIRECTION * length.amax(-1, keepdim=True))[..., None, :]
            block.V = torch.where(alive, W / torch.where(alive, length[..., None, :], 1.0).to(W.dtype), block.V)

    def corrections(self) -> list[Correction]:
        """The corrections of this rank's blocks."""
        whole = self._totals([energy(block.M).double() for block in self.blocks])
        W = self._gathered(self.W, "basis", "columns")
        spikes = [length.square().sum(-1) for length in self.lengths]
        tails = self._tails(whole, spikes, W)
        found = []
        for block, U, columns, length, spike, tail in zip(
            self.blocks, self.U, W, self.lengths, spikes, tails, strict=True
        ):
            spare = min(block.grid.shape) - U.shape[-1]
            total = tail + spike
            shaped = tail > EMPTY_TAIL * total if spare > 0 else torch.zeros_like(tail, dtype=torch.bool)
            sigma = torch.where(shaped, tail / max(spare, 1), 0.0).sqrt()
            alive = shaped[..., None] & (length > DEAD_DIRECTION * total.sqrt()[..., None])
            factor = torch.where(alive, sigma[..., None] / torch.where(alive, length, 1.0) - 1, 0.0)
            norm = torch.where(shaped, tail + alive.sum(-1) * sigma.square(), total).sqrt()
            found.append(Correction(U, columns * factor[..., None, :].to(columns.dtype), norm.to(columns.dtype)))
        return found

    def _tails(self, whole: list[Tensor], spikes: list[Tensor], W: list[Tensor]) -> list[Tensor]:
        """‖M − U Wᵀ‖_F²: the difference of norms if it is not small, else the norm of the difference."""
        differences = [total - spike for total, spike in zip(whole, spikes, strict=True)]
        plain = [difference > PLAIN_TAIL * spike for difference, spike in zip(differences, spikes, strict=True)]
        # Ranks that hold other matrices of a stack have other numbers, but must send the same messages.
        stacked = any(block.grid.depth is not None for block in self.blocks)
        if reading_is_free(self.blocks[0].M) and not stacked and all(bool(flags.all()) for flags in plain):
            return differences
        thins = zip(self.blocks, self.U, W, strict=True)
        formed = self._totals([energy(block.M - U @ columns.mT).double() for block, U, columns in thins])
        return [torch.where(*found) for found in zip(plain, differences, formed, strict=True)]

    def _orthonormal(self, Y: list[Tensor]) -> list[Tensor]:
        """Orthonormalise the columns of Y, whose rows are on many ranks, by Cholesky-QR in float64, twice.

        Columns that depend on the columns before them become zero."""
        Q = [y.double() for y in Y]
        for _ in range(2):
            grams = self._totals([q.mT @ q for q in Q])
            Q = [q @ _inverse_factor(gram) for q, gram in zip(Q, grams, strict=True)]
        return [q.to(y.dtype) for q, y in zip(Q, Y, strict=True)]

    def _totals(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Sum one small float64 tensor of each block over the block's family, in one reduction for all blocks."""
        me = self.team.member
        slots = []
        for block, value in zip(self.blocks, values, strict=True):
            depth = block.grid.depth
            slot = value.new_zeros((1, *value.shape) if depth is None else (depth, *value.shape[1:]))
            # Only one replica contributes, so that all replicas get the same bits.
            if block.grid.sharding.replica(me) == 0:
                if depth is None:
                    slot[0] = value
                else:
                    put(slot, [block.grid.stack(me), *_full(value.shape[1:])], value)
            slots.append(slot)
        flat = torch.cat([slot.reshape(-1) for slot in slots])
        self.team.sum(flat, "spike, small sums")
        results = []
        for block, slot, found in zip(self.blocks, slots, torch.split(flat, [s.numel() for s in slots]), strict=True):
            total = found.view(slot.shape)
            results.append(total[0] if block.grid.depth is None else take(total, [block.grid.stack(me)]))
        return results

    def _gathered(self, tensors: Sequence[Tensor], have: Share, want: Share) -> list[Tensor]:
        """Send rows from the members that have them to all members of their family that want them."""
        return self._routed(tensors, have, want, summed=False)

    def _summed(self, tensors: Sequence[Tensor], have: Share, want: Share) -> list[Tensor]:
        """Send partial sums of rows to the member that keeps each row, and sum them there in the order of members."""
        return self._routed(tensors, have, want, summed=True)

    def _routed(self, tensors: Sequence[Tensor], have: Share, want: Share, *, summed: bool) -> list[Tensor]:
        moving = [i for i, block in enumerate(self.blocks) if block.grid.moves(have, want)]
        if not moving:
            return list(tensors)
        sent = [tensors[i] for i in moving]
        sizes = tuple((self.blocks[i].grid, *tensors[i].shape[:-2], tensors[i].shape[-1]) for i in moving)
        route, shapes = self.team.planned(
            ("spike", sizes, have, want, summed), lambda: plan_rows(self.team, sizes, have, want, summed=summed)
        )
        exchange = self.team.exchange(route, sent, dtype=sent[0].dtype, device=sent[0].device, purpose="spike, columns")
        # Zeros, since some members may not send all rows of a sum.
        targets = [sent[0].new_zeros(shape) if summed else sent[0].new_empty(shape) for shape in shapes]
        exchange.wait(targets)
        results = list(tensors)
        for i, target in zip(moving, targets, strict=True):
            results[i] = target.sum(0) if summed else target
        return results


def plan_rows(
    team: Team, sizes: Sequence[tuple[Any, ...]], have: Share, want: Share, *, summed: bool
) -> tuple[Route, list[tuple[int, ...]]]:
    """Plan the route of rows of blocks from the members that have them to those that want them.

    Args:
        sizes: for every block its grid, the leading dimensions of the tensor, and its columns.
        summed: several members have partial sums of the same rows, which are received separately to be summed.

    Returns:
        The route, and the shapes of its targets: (..., rows, columns), or (members, ..., rows, columns).
    """
    planner = RoutePlanner(team.order)
    shapes: list[tuple[int, ...]] = []
    # Layers of a model have equal sizes.
    parcels = {size: _parcels(team.member, *size, have=have, want=want, summed=summed) for size in dict.fromkeys(sizes)}
    for slot, size in enumerate(sizes):
        found, shape = parcels[size]
        for member, sent, received in found:
            if member == team.member:
                planner.keep(slot, slot, received)
                continue
            for copy in received:
                planner.receive(member, slot, [copy])
            for copy in sent:
                planner.send(member, slot, [copy])
        shapes.append(shape)
    return planner.route(), shapes


def _parcels(
    me: int, grid: Grid, *leading_and_columns: int, have: Share, want: Share, summed: bool
) -> tuple[list[tuple[int, list[Copy], list[Copy]]], tuple[int, ...]]:
    """For every member of a block's family, the copies to and from parcels; and the shape of the target.

    For this rank itself, the second list has copies between tensors."""
    *leading, k = leading_and_columns
    deep, has, wants = math.prod(leading), grid.share(have), grid.share(want)
    mine, wanted = has(me), wants(me)
    rows_here, rows_wanted = count(mine), count(wanted)
    found = []
    layers = 0
    for member in grid.family(me):
        sent: list[Copy] = []
        received: list[Copy] = []
        layer = layers * deep * rows_wanted * k if summed else 0
        for here, there in overlaps(wanted, has(member)):
            copy = _rows_to_parcel(deep, rows_wanted, here, k).reversed().moved(target=layer)
            if member == me:
                source = _rows_to_parcel(deep, rows_here, there, k)
                copy = copy._replace(source_strides=source.source_strides, source=source.source)
            received.append(copy)
        layers += bool(received)
        if member != me:
            sent = [_rows_to_parcel(deep, rows_here, here, k) for here, _ in overlaps(mine, wants(member))]
        found.append((member, sent, received))
    return found, (*((layers,) if summed else ()), *leading, rows_wanted, k)


def _rows_to_parcel(deep: int, rows: int, some: slice, k: int) -> Copy:
    """The copy of some rows of a contiguous (deep, rows, k) tensor to a parcel."""
    many = some.stop - some.start
    return Copy((deep, many * k), (rows * k, 1), (many * k, 1), some.start * k, 0)


def _full(shape: Sequence[int]) -> list[Intervals]:
    return [((0, size),) if size else () for size in shape]


def _inverse_factor(gram: Tensor) -> Tensor:
    """R⁻¹ for the Gram matrix RᵀR of some columns, (..., k, k), with zero columns for dependent columns."""
    length = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    some = length > 0
    scale = torch.where(some, 1 / torch.where(some, length, 1.0), 0.0)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    unit = gram * scale[..., None, :] * scale[..., :, None]
    # A zero column gets a unit diagonal, so that the factor exists.
    unit = unit + torch.diag_embed(torch.where(some, SHIFT, 1.0))
    L, info = torch.linalg.cholesky_ex(unit)
    L = torch.where((info == 0)[..., None, None], L, identity)
    independent = some & (L.diagonal(dim1=-2, dim2=-1) > DEPENDENT)
    inverse: Tensor = torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False).mT
    found: Tensor = scale[..., :, None] * inverse * independent[..., None, :]
    return found
