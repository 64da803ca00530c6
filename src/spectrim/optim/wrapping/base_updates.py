"""Clips the update of a wrapped base optimizer, and applies it to the weights.

Clipping commutes with scaling, η H_c(U) = H_ηc(ηU), so the base's change −ηU is clipped directly, at ηc.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spectrim.distributed.collectives import Team
from spectrim.distributed.owners import Loads
from spectrim.kernels.lists import grouped
from spectrim.optim.grouping.options import is_zero
from spectrim.optim.rules.rule import Rule, in_scope
from spectrim.optim.rules.schedule import clip_threshold, number_if_free
from spectrim.optim.sharded.rounds import run_rounds
from spectrim.optim.sharded.shape import shape_round
from spectrim.optim.spectral.clip import CLIPS
from spectrim.optim.stepping.buckets import buckets
from spectrim.optim.stepping.entries import kind_of
from spectrim.optim.stepping.operate import operate
from spectrim.optim.stepping.step import apply_to
from spectrim.optim.wrapping.probe import StepDecomposition
from spectrim.optim.wrapping.wrapped_entry import WrappedEntry, WrappedShard, idle

__all__ = ["clip_changes", "keep_and_limit", "rule_of_changes"]


def rule_of_changes(group: Mapping[str, Any], role: str, *, vector: bool, index: int) -> Rule:
    """The rule that clips the base's changes of parameters of a role; its threshold is ηc."""
    limit = _limit(group, role)
    clip = None if limit is None else CLIPS[group["clip_form"]].of(group)
    return Rule(vector=vector, group=index, clip=clip, threshold=limit, raises=group["on_nonfinite"] == "raise")


def clip_changes(entries: Sequence[WrappedEntry], groups: Sequence[Mapping[str, Any]]) -> None:
    """Clip and apply the base's changes. Parameters that it did not step stay as they are."""
    resting = idle(entries)
    here: list[WrappedEntry] = []
    across: list[WrappedShard] = []
    decaying: dict[tuple[int, float], Rule] = {}
    for entry in entries:
        lr = groups[entry.position[0]]["lr"]
        if entry in resting or is_zero(lr):
            continue
        entry.keep = entry.decomposition.keep(_usable(lr))
        if not isinstance(entry.keep, Tensor):
            # Decay and update are applied together, so that weights in narrow dtypes are rounded once.
            key = (id(entry.rule), entry.keep)
            entry.rule = decaying.setdefault(key, replace(entry.rule, weight_decay=1 - entry.keep))
        if isinstance(entry, WrappedShard) and not entry.is_alone():
            across.append(entry)
        elif entry.parameter.numel():
            here.append(entry)
    for bucket in buckets(here):
        wrapped = [entry for stack in bucket for entry in stack.entries]
        views = [view for stack in bucket for view in stack.tensor.unbind()]
        for entry, view in zip(wrapped, views, strict=True):
            view.copy_(entry.direction())
            entry.restore()
        _subtract(wrapped, views, operate(bucket))
    loads: Loads = {}
    for shards in grouped(across, kind_of).values():
        run_rounds(shards, lambda team, some: _round(team, some, loads))


def keep_and_limit(
    group: Mapping[str, Any], role: str, decomposition: StepDecomposition
) -> tuple[float | Tensor, float | Tensor | None]:
    """The factor of the base's decay on the weights, and the threshold of its change, or None without a clip."""
    return decomposition.keep(_usable(group["lr"])), _limit(group, role)


def _limit(group: Mapping[str, Any], role: str) -> float | Tensor | None:
    lr = _usable(group["lr"])
    threshold = clip_threshold({**group, "lr": lr}) if in_scope(group, role) else None
    return None if threshold is None else threshold * lr


def _round(team: Team, entries: list[WrappedShard], loads: Loads) -> Iterator[None]:
    """Clip and apply the changes of shards of one rule and layout, together with the other ranks."""
    directions = [entry.direction() for entry in entries]
    for entry in entries:
        entry.restore()
    yield from shape_round(team, entries, directions, loads, lambda updates: _subtract(entries, updates))


def _subtract(
    entries: Sequence[WrappedEntry], updates: Sequence[Tensor], factors: Sequence[float] | None = None
) -> None:
    """X ← keep · X − factor · U; without ``factors``, they are 1."""
    for entry in entries:
        if isinstance(entry.keep, Tensor):
            entry.parameter.copy_(entry.parameter * entry.keep)
    apply_to(entries, updates, factors)


def _usable(lr: float | Tensor) -> float | Tensor:
    """A learning rate as a number if reading it does not block; else a tensor above zero, safe to divide by."""
    lr = number_if_free(lr)
    return lr.clamp_min(torch.finfo(lr.dtype).tiny) if isinstance(lr, Tensor) else lr
