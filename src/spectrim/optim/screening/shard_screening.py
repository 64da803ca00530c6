"""Combines over ranks what a step needs to know of sharded gradients: presence, finiteness and entry scales.

One reduction serves all parameters of a mesh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spectrim.distributed.collectives import Team
from spectrim.optim.sharded.entry import ShardedEntry, by_team
from spectrim.optim.stepping.entries import Entry

__all__ = ["flag_absent", "screen_shards", "settle"]


def screen_shards(
    entries: Sequence[ShardedEntry], values: Mapping[Any, Tensor], carried: Tensor, group: dist.ProcessGroup | None
) -> Tensor:
    """Sum the entries' values over ranks, and set each entry's ``total``, ``present`` and, for shrinkage, scales.

    A rank without a gradient for its shard counts as zeros. If only some replicas of a shard have a gradient, it counts
    as not finite, since the replicas would take different steps.

    Args:
        entries: on every rank those of the same parameters, in the same order.
        values: one number of each local gradient, such as its squared norm; NaN or infinite if the gradient is not
            finite.
        carried: a scalar that is NaN if this rank has another gradient that is not finite.
        group: further ranks that must get the same result, or None.

    Returns:
        A float64 scalar that is NaN if anything is not finite on any rank of the meshes.
    """
    teams = by_team(entries)
    carried = carried.double().reshape(1)
    for team, found in teams:
        pieces = [carried]
        sums = {entry: entry.root_sums(entry.grad) for entry in found if entry.shares_scales}
        for entry in found:
            pieces += [_flags(entry, values[entry]), *(numbers.reshape(-1) for numbers in sums.get(entry, ()))]
        total = torch.cat(pieces)
        team.sum(total, "screening")
        numbers = iter(torch.split(total, [len(piece) for piece in pieces]))
        next(numbers)
        # Zero times a number is zero if it is finite, else NaN.
        carried = total.mul(0).sum().reshape(1)
        for entry in found:
            value, present, parted = next(numbers).unbind()
            entry.total = torch.where(parted == 0, value / entry.sharding.replicas, torch.nan)
            entry.present = present > 0
            carried = carried + torch.where(parted == 0, 0.0, torch.nan)
            if entry in sums:
                entry.set_scales([next(numbers) for _ in sums[entry]])
    return settle([team for team, _ in teams[:-1]], carried, group)


def settle(teams: Sequence[Team], carried: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum a number, NaN if something is not finite, over one mesh after the other, so that all ranks get the NaN."""
    for team in teams:
        team.sum(carried, "screening")
    if group is not None:
        dist.all_reduce(carried, group=group)
    return carried[0]


def flag_absent(entries: Sequence[Entry], found: Tensor) -> None:
    """Give every shard without a gradient here its own skip flag: set if no rank has a gradient for the parameter."""
    for entry in entries:
        if isinstance(entry, ShardedEntry) and not entry.has_gradient:
            assert entry.present is not None
            entry.found = torch.maximum(found, (~entry.present).float())


def _flags(entry: ShardedEntry, value: Tensor) -> Tensor:
    """The value, 1 if there is a gradient, and a number that sums to zero if all replicas agree on that."""
    sharding, me = entry.sharding, entry.team.member
    first = sharding.replica(me) == 0
    # Integers, so that sums are exact; a different one for each shard, so that disagreements do not cancel.
    weight = 1 + sharding.shard(me) * 40503 % 65521
    parted = weight * entry.has_gradient * ((sharding.replicas if first else 0) - 1)
    present = value.new_full((1,), float(entry.has_gradient), dtype=torch.float64)
    return torch.cat([value.double().reshape(1), present, torch.full_like(present, parted)])
