"""Operator, scale and clip of directions whose matrices lie on many ranks: :mod:`shaping` for shards.

Matrices are shaped whole at their owners, spikes in place, and the norms of vectors in one reduction. Relied on by the
step of the optimizers here and by the wrapper of others, which differ in where directions come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spectrim.distributed.collectives import Team
from spectrim.distributed.spike import Block, shape_spikes
from spectrim.optim.entries import stack_length
from spectrim.optim.entrywise import store
from spectrim.optim.layout import Layout, matrices
from spectrim.optim.recipe import Recipe
from spectrim.optim.rounds import Loads, set_out, unit_layout
from spectrim.optim.shaping import FIRST_POWER_STEPS, Update, basis_slices_of, scale_factor, shape_matrices
from spectrim.optim.sharded import ShardedEntry

__all__ = ["ShardedShape", "norm_shares"]

#: Takes an update of an entry's shard, or of the view of it that is given.
Apply = Callable[[ShardedEntry, Tensor, Update], None]


@dataclass(kw_only=True)
class ShardedShape:
    """From the directions of entries of one role and layout to their updates.

    Attributes:
        recipe, options: as they act on the role; options are the effective ones.
        threshold: c of the clip, or None for no clip.
        apply: what is done with an update.
    """

    recipe: Recipe
    options: Mapping[str, Any]
    layout: Layout
    threshold: float | Tensor | None
    loads: Loads
    apply: Apply

    def step(self, team: Team, entries: Sequence[ShardedEntry], directions: Sequence[Tensor]) -> Iterator[None]:
        """Shape and apply one round's directions, local tensors that may be used up; see :func:`~rounds.run_rounds`."""
        recipe, options, threshold = self.recipe, self.options, self.threshold
        if self.layout == "vector":
            shaped = directions if threshold is None else self._clipped_vectors(team, entries, directions, threshold)
            self._apply(entries, shaped)
            return
        if recipe.operator == "shape_spike":
            updates = self._shaped_spikes(team, entries, directions)
            if threshold is None:
                for entry, found in zip(entries, updates, strict=True):
                    for weight, update in zip(entry.views(entry.parameter), found, strict=True):
                        self.apply(entry, weight, update)
                return
            directions = [_formed(entry, found) for entry, found in zip(entries, updates, strict=True)]
            recipe = replace(recipe, operator="none")
            options = {**options, "scale": "none"}
        elif recipe.operator == "none" and threshold is None and options["scale"] == "none":
            self._apply(entries, directions)
            return
        dtype = torch.bfloat16 if options["exchange_dtype"] == "bfloat16" else directions[0].dtype
        journey = set_out(team, entries, directions, dtype=dtype, loads=self.loads)
        yield
        journey.work(lambda indices, found: self._shaped(recipe, options, found))
        yield
        self._apply(entries, journey.arrive())

    def _apply(self, entries: Sequence[ShardedEntry], directions: Sequence[Tensor]) -> None:
        for entry, direction in zip(entries, directions, strict=True):
            self.apply(entry, entry.parameter, Update(dense=direction))

    def _shaped(self, recipe: Recipe, options: Mapping[str, Any], found: list[Tensor]) -> list[Tensor]:
        """Operator, scale and clip of whole matrices of one shape, stacked where company helps."""
        layout, threshold = unit_layout(self.layout), self.threshold
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
        shares = norm_shares(squares.sqrt() / threshold, self.options["clip_form"])
        return [direction * share.to(direction.dtype) for direction, share in zip(directions, shares, strict=True)]


def norm_shares(ratios: Tensor, form: str) -> Tensor:
    """What vectors are multiplied by to clip their norms, for the ratios of these to the threshold."""
    return 1 / (ratios.clamp_min(1) if form == "hard" else torch.hypot(torch.ones_like(ratios), ratios))


def _formed(entry: ShardedEntry, updates: Sequence[Update]) -> Tensor:
    """The update of a whole shard as one tensor."""
    dtype = torch.promote_types(entry.parameter.dtype, torch.float32)
    whole = torch.empty_like(entry.parameter, dtype=dtype)
    for view, update in zip(entry.views(whole), updates, strict=True):
        view.copy_(update.formed())
    return whole
