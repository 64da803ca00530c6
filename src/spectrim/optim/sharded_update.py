"""The step of sharded parameters whose operator needs more than this rank's shards.

Phases of a round, each a message ahead of the next: *prepare* the gradients, *direct* them entry by entry, *shape*
matrices at their owners or spikes in place, *apply* the update to the shard. While a round's message travels, others
are worked on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spectrim.distributed.collectives import Team
from spectrim.distributed.owners import Journey, units
from spectrim.distributed.spike import Block, shape_spikes
from spectrim.operators import smooth_shrink, soft_clip
from spectrim.optim.entries import stack_length
from spectrim.optim.entrywise import apply, direct, fused_adamw, fused_adamw_serves, is_adamw, store
from spectrim.optim.gradient import map_matrices, prepare, shrink_factor
from spectrim.optim.layout import Layout, matrices
from spectrim.optim.options import is_zero
from spectrim.optim.recipe import Recipe
from spectrim.optim.schedule import clip_threshold
from spectrim.optim.shaping import (
    FIRST_POWER_STEPS,
    Update,
    basis_slices_of,
    scale_factor,
    shape_matrices,
)
from spectrim.optim.sharded import ShardedEntry, by_team

__all__ = ["ShardedUpdate"]

#: How many bytes of matrices, in float32, each owner holds at once; one matrix always may.
ROUND_BYTES = 64 * 2**20

#: Options that are done with once a gradient is prepared.
_PREPARED = {"maximize": False, "shrink": None, "pre_clip": None}


@dataclass(kw_only=True)
class ShardedUpdate:
    """One recipe's step on entries of one role and layout.

    Attributes:
        recipe, options: as they act on the role; options are the effective ones.
        weight_decay: as it acts on the layout.
        loads: for every team the work of its members so far, of one step and all its recipes.
    """

    recipe: Recipe
    options: Mapping[str, Any]
    layout: Layout
    weight_decay: float
    loads: dict[Any, list[int]]

    def run(self, entries: Sequence[ShardedEntry]) -> None:
        """Step all entries. Every rank calls this with its shards of the same parameters, in the same order."""
        for entry in entries:
            entry.state["step"] += 1 if entry.taken is None else entry.taken
        for team, found in by_team(entries):
            _interleave([self._step(team, some) for some in _rounds(found, team.size)])

    def _step(self, team: Team, entries: list[ShardedEntry]) -> Iterator[None]:
        """One round; it yields whenever a message has been posted that it waits for next."""
        options = self.options
        grads = [self._prepared(entry) for entry in entries]
        if options["pre_clip"] is not None and self.layout != "vector":
            journey = self._journey(team, entries, grads)
            yield
            journey.work(self._pre_clipped)
            yield
            grads = journey.arrive()
        for entry, grad in zip(entries, grads, strict=True):
            entry.grad = grad
        done = {**options, **_PREPARED}
        if is_adamw(self.recipe, done):
            for entry in entries:
                if fused_adamw_serves(entry, done):
                    fused_adamw(entry, done, self.weight_decay)
                else:
                    self._apply(entry, direct(self.recipe, done, entry))
            return
        directions = [direct(self.recipe, done, entry) for entry in entries]
        if options["shrink"] is not None and options["shrink_at"] == "direction":
            directions = self._shrunk_directions(team, entries, directions)
        if is_zero(options["lr"]):
            return
        threshold = clip_threshold(options)
        if self.layout == "vector":
            clipped = directions if threshold is None else self._clipped_vectors(team, entries, directions, threshold)
            for entry, direction in zip(entries, clipped, strict=True):
                self._apply(entry, direction)
            return
        recipe = self.recipe
        if recipe.operator == "shape_spike":
            updates = self._shaped_spikes(team, entries, directions)
            if threshold is None:
                for entry, found in zip(entries, updates, strict=True):
                    for weight, update in zip(entry.views(entry.parameter), found, strict=True):
                        apply(entry, weight, update, options, self.weight_decay)
                return
            directions = [_formed(entry, found) for entry, found in zip(entries, updates, strict=True)]
            recipe = replace(recipe, operator="none")
            options = {**options, "scale": "none"}
        elif recipe.operator == "none" and threshold is None and options["scale"] == "none":
            for entry, direction in zip(entries, directions, strict=True):
                self._apply(entry, direction)
            return
        journey = self._journey(team, entries, directions)
        yield
        journey.work(lambda indices, found: self._shaped(recipe, options, threshold, found))
        yield
        for entry, direction in zip(entries, journey.arrive(), strict=True):
            self._apply(entry, direction)

    # -- Gradients -----------------------------------------------------------------------------------------------------

    def _prepared(self, entry: ShardedEntry) -> Tensor:
        """The gradient in float32 or better, its sign turned and its entries shrunk where asked for."""
        exact = prepare(entry.grad, {**self.options, "shrink": None, "pre_clip": None}, self.layout)
        if self.options["shrink"] is None or self.options["shrink_at"] != "gradient":
            return exact
        if not entry.scales:
            entry.set_scales(entry.root_sums(exact))
        return self._shrunk(entry, exact)

    def _shrunk(self, entry: ShardedEntry, tensor: Tensor) -> Tensor:
        result = torch.empty_like(tensor)
        factor, form = shrink_factor(self.options), self.options["shrink_form"]
        for source, target, scale in zip(entry.views(tensor), entry.views(result), entry.scales, strict=True):
            target.copy_(smooth_shrink(source, factor * scale, form=form))
        return result

    def _shrunk_directions(
        self, team: Team, entries: Sequence[ShardedEntry], directions: Sequence[Tensor]
    ) -> list[Tensor]:
        sums = [entry.root_sums(direction) for entry, direction in zip(entries, directions, strict=True)]
        total = torch.cat([number.reshape(-1) for found in sums for number in found])
        team.sum(total, "scales")
        numbers = iter(torch.split(total, [number.numel() for found in sums for number in found]))
        for entry, found in zip(entries, sums, strict=True):
            entry.set_scales([next(numbers).view(number.shape) for number in found])
        return [self._shrunk(entry, direction) for entry, direction in zip(entries, directions, strict=True)]

    # -- Shapes --------------------------------------------------------------------------------------------------------

    def _journey(self, team: Team, entries: Sequence[ShardedEntry], tensors: Sequence[Tensor]) -> Journey:
        stacked = self.layout in ("stack", "transposed_stack")
        found = units([entry.sharding for entry in entries], [stacked] * len(entries))
        dtype = torch.bfloat16 if self.options["exchange_dtype"] == "bfloat16" else tensors[0].dtype
        journey = Journey(team, found, dtype, self.loads.setdefault(team.key, [0] * team.size))
        journey.set_out(tensors)
        return journey

    def _pre_clipped(self, indices: list[int], found: list[Tensor]) -> list[Tensor]:
        layout, threshold = _unit_layout(self.layout), self.options["pre_clip"]
        return [map_matrices(lambda G: soft_clip(G, threshold), G, layout, self.options["split"]) for G in found]

    def _shaped(
        self, recipe: Recipe, options: Mapping[str, Any], threshold: float | Tensor | None, found: list[Tensor]
    ) -> list[Tensor]:
        """Operator, scale and clip of whole matrices of one shape, stacked where company helps."""
        layout = _unit_layout(self.layout)
        results: list[Tensor] = []
        length = stack_length(found[0])
        for start in range(0, len(found), length):
            some = found[start : start + length]
            stacked = torch.stack(some) if len(some) > 1 else some[0].unsqueeze(0)
            result = torch.empty_like(stacked)
            sources = matrices(stacked, layout, options["split"], leading=1)
            for source, target in zip(sources, matrices(result, layout, options["split"], leading=1), strict=True):
                target.copy_(shape_matrices(source, recipe, options, threshold=threshold, overwrite=True)[0].formed())
            results += result.unbind()
        return results

    def _shaped_spikes(
        self, team: Team, entries: Sequence[ShardedEntry], directions: Sequence[Tensor]
    ) -> list[list[Update]]:
        """For every entry, the updates of its blocks; keeps the new basis."""
        ratio = self.options["rank_ratio"]
        blocks, kept = [], []
        for entry, direction in zip(entries, directions, strict=True):
            columns = basis_slices_of([grid.shape for grid in entry.grids], ratio)
            for grid, M, part in zip(entry.grids, entry.views(direction), columns, strict=True):
                kept.append((entry, entry.state["spike_basis"][..., part]))
                blocks.append(Block(grid=grid, M=M, V=kept[-1][1]))
        steps = FIRST_POWER_STEPS if self.options["steps_taken"] == 0 else 1
        corrections = iter(shape_spikes(team, blocks, steps=steps))
        for (entry, target), block in zip(kept, blocks, strict=True):
            store(entry, target, block.V)
        updates = []
        for entry, direction in zip(entries, directions, strict=True):
            found = []
            for grid, M in zip(entry.grids, entry.views(direction), strict=True):
                left, right, norm = next(corrections)
                scale = scale_factor(self.options["scale"], grid.shape, norm)
                found.append(Update(dense=M, left=left, right=right, scale=scale))
            updates.append(found)
        return updates

    def _clipped_vectors(
        self,
        team: Team,
        entries: Sequence[ShardedEntry],
        directions: Sequence[Tensor],
        threshold: float | Tensor,
    ) -> list[Tensor]:
        """Each direction with its whole norm clipped; one reduction for all."""
        squares = torch.stack(
            [
                torch.linalg.vector_norm(direction, dtype=torch.float64).square()
                * (entry.sharding.replica[team.member] == 0)
                for entry, direction in zip(entries, directions, strict=True)
            ]
        )
        team.sum(squares, "norms of vectors")
        ratios = squares.sqrt() / threshold
        hard = self.options["clip_form"] == "hard"
        shares = 1 / (ratios.clamp_min(1) if hard else torch.hypot(torch.ones_like(ratios), ratios))
        return [direction * share.to(direction.dtype) for direction, share in zip(directions, shares, strict=True)]

    def _apply(self, entry: ShardedEntry, direction: Tensor) -> None:
        apply(entry, entry.parameter, Update(dense=direction), self.options, self.weight_decay)


def _formed(entry: ShardedEntry, updates: Sequence[Update]) -> Tensor:
    """The update of a whole shard as one tensor."""
    dtype = torch.promote_types(entry.parameter.dtype, torch.float32)
    whole = torch.empty_like(entry.parameter, dtype=dtype)
    for view, update in zip(entry.views(whole), updates, strict=True):
        view.copy_(update.formed())
    return whole


def _unit_layout(layout: Layout) -> Layout:
    """How one matrix of a stack is read, or the tensor where there is no stack."""
    single: dict[Layout, Layout] = {"stack": "matrix", "transposed_stack": "transposed"}
    return single.get(layout, layout)


def _rounds(entries: Sequence[ShardedEntry], members: int) -> Iterator[list[ShardedEntry]]:
    """Entries in order, as many together as fill every owner's room."""
    some: list[ShardedEntry] = []
    room = ROUND_BYTES * members
    for entry in entries:
        size = 4 * math.prod(entry.sharding.shape)
        if some and size > room:
            yield some
            some, room = [], ROUND_BYTES * members
        some.append(entry)
        room -= size
    if some:
        yield some


def _interleave(rounds: Sequence[Iterator[None]]) -> None:
    """Run rounds each one message behind the one before, so that the newest one's travels while older ones are worked
    on."""
    waiting = list(rounds)[::-1]
    under_way: list[Iterator[None]] = []
    while waiting or under_way:
        if waiting:
            under_way.insert(0, waiting.pop())
        under_way = [step for step in under_way if next(step, _FINISHED) is not _FINISHED]


_FINISHED = object()
