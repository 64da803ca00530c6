"""The step of sharded parameters whose operator needs more than this rank's shards.

Phases of a round, each a message ahead of the next: *prepare* the gradients, *direct* them entry by entry, then
*shape* and *apply* what :mod:`sharded_shape` makes of the directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectrim.distributed.collectives import Team
from spectrim.operators import soft_clip
from spectrim.optim.entrywise import apply, direct, fused_adamw, fused_adamw_serves, is_adamw
from spectrim.optim.gradient import map_matrices, prepare, shrink_factor
from spectrim.optim.layout import Layout
from spectrim.optim.options import is_zero
from spectrim.optim.recipe import Recipe
from spectrim.optim.rounds import Loads, run_rounds, set_out, unit_layout
from spectrim.optim.schedule import clip_threshold
from spectrim.optim.shaping import Update
from spectrim.optim.sharded import ShardedEntry
from spectrim.optim.sharded_shape import ShardedShape

__all__ = ["ShardedUpdate"]

#: Options that are done with once a gradient is prepared.
_PREPARED = {"maximize": False, "shrink": None, "pre_clip": None}


@dataclass(kw_only=True)
class ShardedUpdate:
    """One recipe's step on entries of one role and layout.

    Attributes:
        recipe, options: as they act on the role; options are the effective ones.
        weight_decay: as it acts on the layout.
        loads: of one step and all its recipes.
    """

    recipe: Recipe
    options: Mapping[str, Any]
    layout: Layout
    weight_decay: float
    loads: Loads

    def run(self, entries: Sequence[ShardedEntry]) -> None:
        """Step all entries. Every rank calls this with its shards of the same parameters, in the same order."""
        for entry in entries:
            entry.state["step"] += 1 if entry.taken is None else entry.taken
        run_rounds(entries, self._step)

    def _step(self, team: Team, entries: list[ShardedEntry]) -> Iterator[None]:
        options = self.options
        grads = [self._prepared(entry) for entry in entries]
        if options["pre_clip"] is not None and self.layout != "vector":
            dtype = torch.bfloat16 if options["exchange_dtype"] == "bfloat16" else grads[0].dtype
            journey = set_out(team, entries, grads, dtype=dtype, loads=self.loads)
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
                    self._apply(entry, entry.parameter, Update(dense=direct(self.recipe, done, entry)))
            return
        directions = [direct(self.recipe, done, entry) for entry in entries]
        if options["shrink"] is not None and options["shrink_at"] == "direction":
            directions = self._shrunk_directions(team, entries, directions)
        if is_zero(options["lr"]):
            return
        shape = ShardedShape(
            recipe=self.recipe,
            options=options,
            layout=self.layout,
            threshold=clip_threshold(options),
            loads=self.loads,
            apply=self._apply,
        )
        yield from shape.step(team, entries, directions)

    def _apply(self, entry: ShardedEntry, weight: Tensor, update: Update) -> None:
        apply(entry, weight, update, self.options, self.weight_decay)

    def _prepared(self, entry: ShardedEntry) -> Tensor:
        """The gradient in float32 or better, its sign turned and its entries shrunk where asked for."""
        exact = prepare(entry.grad, {**self.options, "shrink": None, "pre_clip": None}, self.layout)
        if self.options["shrink"] is None or self.options["shrink_at"] != "gradient":
            return exact
        if not entry.shares_scales:
            entry.set_scales(entry.root_sums(exact))
        return self._shrunk(entry, exact)

    def _shrunk(self, entry: ShardedEntry, tensor: Tensor) -> Tensor:
        return entry.shrunk(tensor, shrink_factor(self.options), self.options["shrink_form"])

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

    def _pre_clipped(self, indices: list[int], found: list[Tensor]) -> list[Tensor]:
        layout, threshold = unit_layout(self.layout), self.options["pre_clip"]
        return [map_matrices(lambda G: soft_clip(G, threshold), G, layout, self.options["split"]) for G in found]
