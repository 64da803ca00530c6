"""The spike of sharded matrices, followed and shaped without gathering one: products with what is local, and exchanges
of k columns.

The same mathematics as :mod:`spectrim.operators.spike`, for any grid of blocks: with M_ij on one rank, Y = MV and
W = MᵀU are sums of local products over the ranks of a row or a column of blocks. All matrices of a bucket share their
messages. What is computed on several ranks is computed from the same bits: sums of small things go over the whole
team, and sums of long things are taken in the order of members.
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

#: Added to a Gram matrix of unit diagonal so that its Cholesky factor exists; far below what float32 columns resolve.
SHIFT = 1e-14

#: A column of which less than this is left, once the ones before it are taken out, is rounding.
DEPENDENT = 5e-7


@dataclass(kw_only=True, eq=False)
class Block:
    """This rank's part of a matrix, or of a stack of them.

    Attributes:
        M: (..., rows, columns), the local block.
        V: (..., kept columns, k), the local part of the basis. Replaced by the new one.
    """

    grid: Grid
    M: Tensor
    V: Tensor


class Correction(NamedTuple):
    """The shaped block O = M + left rightᵀ, unformed, and the norm of the whole O, of shape (...)."""

    left: Tensor
    right: Tensor
    norm: Tensor


def shape_spikes(team: Team, blocks: Sequence[Block], *, steps: int) -> list[Correction]:
    """Follow the spikes of some matrices by power steps, and shrink them to their tails' scale.

    Args:
        team: all of whose members call this with their blocks of the same matrices.
        blocks: of one dtype and device.
        steps: power steps, at least 1.
    """
    work = _SpikeStep(team, blocks)
    for _ in range(steps):
        work.power_step()
    return work.corrections()


class _SpikeStep:
    """The tensors of one call: lists with one item for every block."""

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
        """What turns each M into its shaped O, where the rows and columns of this block are."""
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
        """‖M − U Wᵀ‖_F²: a difference of norms where that is no small one, and formed where it is."""
        differences = [total - spike for total, spike in zip(whole, spikes, strict=True)]
        plain = [difference > PLAIN_TAIL * spike for difference, spike in zip(differences, spikes, strict=True)]
        numbers = [float(flags.double().mean()) for flags in plain if flags.numel()] if self._readable() else []
        if self._readable() and all(number == 1.0 for number in numbers) and not self._stacked():
            return differences
        formed = self._totals(
            [
                energy(block.M - U @ columns.mT).double()
                for block, U, columns in zip(self.blocks, self.U, W, strict=True)
            ]
        )
        return [torch.where(*found) for found in zip(plain, differences, formed, strict=True)]

    def _readable(self) -> bool:
        return reading_is_free(self.blocks[0].M)

    def _stacked(self) -> bool:
        # Ranks that hold other matrices of a stack see other numbers, and must send the same messages.
        return any(block.grid.depth is not None for block in self.blocks)

    def _orthonormal(self, Y: list[Tensor]) -> list[Tensor]:
        """The Q of Y's QR decomposition up to the signs of its columns, from Y's rows on many ranks: Cholesky's
        factor of the Gram matrix, in float64 and twice. Columns that depend on the ones before them become zero."""
        Q = [y.double() for y in Y]
        for _ in range(2):
            grams = self._totals([q.mT @ q for q in Q])
            Q = [q @ _inverse_factor(gram) for q, gram in zip(Q, grams, strict=True)]
        return [q.to(y.dtype) for q, y in zip(Q, Y, strict=True)]

    def _totals(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The sum over its family of one small float64 tensor for each block, in one reduction for all."""
        me = self.team.member
        slots = []
        for block, value in zip(self.blocks, values, strict=True):
            depth = block.grid.depth
            slot = value.new_zeros((1, *value.shape) if depth is None else (depth, *value.shape[1:]))
            # Replicas would count twice. One of them speaks for all, so that all hear the same bits.
            if block.grid.replica(me) == 0:
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
        """Rows that members have, brought to all of their family that want them."""
        return self._routed(tensors, have, want, summed=False)

    def _summed(self, tensors: Sequence[Tensor], have: Share, want: Share) -> list[Tensor]:
        """Partial sums of rows, brought to the member that keeps each row and summed there, in the order of members."""
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
        # Some members' parts may leave rows of a sum out.
        targets = [sent[0].new_zeros(shape) if summed else sent[0].new_empty(shape) for shape in shapes]
        exchange.wait(targets)
        results = list(tensors)
        for i, target in zip(moving, targets, strict=True):
            results[i] = target.sum(0) if summed else target
        return results


def plan_rows(
    team: Team, sizes: Sequence[tuple[Any, ...]], have: Share, want: Share, *, summed: bool
) -> tuple[Route, list[tuple[int, ...]]]:
    """How rows of some blocks get from those who have them to those who want them.

    Args:
        sizes: for every block its grid, the leading dimensions of what travels, and its columns.
        summed: whether what several members have of the same rows is kept apart, to be summed.

    Returns:
        The route, and the shapes of its targets: (..., rows, columns), or (members, ..., rows, columns).
    """
    planner = RoutePlanner(team.order, team.member)
    shapes: list[tuple[int, ...]] = []
    # Layers of a model are alike.
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
    """For every member of a block's family the copies to parcels for it and from parcels of it, one each; of this rank
    itself, in the place of the latter, those from tensor to tensor. And the shape of the target."""
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
    """The copy of some rows of a contiguous (deep, rows, k) tensor to a parcel of their own."""
    many = some.stop - some.start
    return Copy((deep, many * k), (rows * k, 1), (many * k, 1), some.start * k, 0)


def _full(shape: Sequence[int]) -> list[Intervals]:
    return [((0, size),) if size else () for size in shape]


def _inverse_factor(gram: Tensor) -> Tensor:
    """R⁻¹ for the Gram matrix RᵀR of some columns, (..., k, k), with zeros where a column is dependent."""
    length = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    some = length > 0
    scale = torch.where(some, 1 / torch.where(some, length, 1.0), 0.0)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    unit = gram * scale[..., None, :] * scale[..., :, None]
    # An empty column is replaced by one that is orthogonal to all, for the factor's sake.
    unit = unit + torch.diag_embed(torch.where(some, SHIFT, 1.0))
    L, info = torch.linalg.cholesky_ex(unit)
    L = torch.where((info == 0)[..., None, None], L, identity)
    independent = some & (L.diagonal(dim1=-2, dim2=-1) > DEPENDENT)
    inverse: Tensor = torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False).mT
    found: Tensor = scale[..., :, None] * inverse * independent[..., None, :]
    return found
