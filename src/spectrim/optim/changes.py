"""What a wrapped base changed, clipped and applied to the weights.

Clipping commutes with scaling, η H_c(U) = H_ηc(ηU): what the base added, −ηU, is clipped as it is, at ηc. Relied on by
:class:`~spectrim.optim.wrapper.SpectralClipping`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spectrim.distributed.collectives import Team
from spectrim.operators._stack import reading_is_free
from spectrim.optim.entries import buckets
from spectrim.optim.held import Held
from spectrim.optim.held_shard import HeldShard, idle
from spectrim.optim.layout import matrices
from spectrim.optim.probe import Manner
from spectrim.optim.recipe import PLAIN_ADAMW
from spectrim.optim.rounds import Loads, run_rounds
from spectrim.optim.schedule import clip_threshold
from spectrim.optim.shaping import Update, apply_update, shape_matrices, shape_vector
from spectrim.optim.sharded import ShardedEntry
from spectrim.optim.sharded_shape import ShardedShape

__all__ = ["clip_changes", "in_scope", "keep_and_limit"]


def clip_changes(group: Mapping[str, Any], entries: Sequence[Held], loads: Loads) -> None:
    """Clip and apply what the base changed in the parameters of one group; those it left alone stay so."""
    resting = idle(entries)
    moved = [entry for entry in entries if entry not in resting]
    across: dict[tuple[Any, ...], list[HeldShard]] = {}
    here: list[Held] = []
    for entry in moved:
        if isinstance(entry, HeldShard) and not entry.is_alone():
            key = (entry.role, entry.layout, entry.parameter.dtype, entry.manner)
            across.setdefault(key, []).append(entry)
        elif not isinstance(entry, HeldShard) or entry.parameter.numel():
            here.append(entry)
    for bucket in buckets(here):
        _update(group, bucket)
    for shards in across.values():
        _update_across(group, shards, loads)


def in_scope(group: Mapping[str, Any], role: str) -> bool:
    """Whether parameters of a role are clipped."""
    return bool(group["clip_scope"] == "all" or role == "matrix")


def keep_and_limit(group: Mapping[str, Any], role: str, manner: Manner) -> tuple[float | Tensor, float | Tensor | None]:
    """What the weights are multiplied by, and the threshold of what is then added to them; None where it is free."""
    lr = _usable(group["lr"])
    threshold = clip_threshold({**group, "lr": lr}) if in_scope(group, role) else None
    return manner.keep(lr), None if threshold is None else threshold * lr


def _update(group: Mapping[str, Any], bucket: list[Held]) -> None:
    """One bucket: entries of one role, layout, shape, dtype and device, whole on this rank."""
    layout = bucket[0].layout
    keep, limit = keep_and_limit(group, bucket[0].role, bucket[0].manner)
    options = {**group, "scale": "none"}
    directions = [entry.direction(keep) for entry in bucket]
    for entry in bucket:
        entry.restore()
    if layout == "vector":
        for entry, direction in zip(bucket, directions, strict=True):
            apply_update(entry.parameter, shape_vector(direction, options, threshold=limit), 1.0, keep=keep)
        return
    stacked = torch.stack(directions) if len(directions) > 1 else directions[0].unsqueeze(0)
    for part, view in enumerate(matrices(stacked, layout, group["split"], leading=1)):
        update = shape_matrices(view, PLAIN_ADAMW, options, threshold=limit)[0]
        for index, entry in enumerate(bucket):
            weight = matrices(entry.parameter, layout, group["split"])[part]
            apply_update(weight, update.at(index), 1.0, keep=keep)


def _update_across(group: Mapping[str, Any], entries: list[HeldShard], loads: Loads) -> None:
    """Shards of parameters of one role, layout and manner, together with the other ranks."""
    keep, limit = keep_and_limit(group, entries[0].role, entries[0].manner)

    def apply(entry: ShardedEntry, weight: Tensor, update: Update) -> None:
        apply_update(weight, update, 1.0, keep=keep)

    shape = ShardedShape(
        recipe=PLAIN_ADAMW,
        options={**group, "scale": "none", "exchange_dtype": "float32"},
        layout=entries[0].layout,
        threshold=limit,
        loads=loads,
        apply=apply,
    )

    def step(team: Team, some: list[HeldShard]) -> Iterator[None]:
        directions = [entry.direction(keep) for entry in some]
        for entry in some:
            entry.restore()
        yield from shape.step(team, some, directions)

    run_rounds(entries, step)


def _usable(lr: float | Tensor) -> float | Tensor:
    """A learning rate as a number where reading it is free; else one by which to divide, even if zero."""
    if not isinstance(lr, Tensor):
        return lr
    return float(lr) if reading_is_free(lr) else lr.clamp_min(torch.finfo(lr.dtype).tiny)
