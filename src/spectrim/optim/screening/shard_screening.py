"""What ranks must agree on before a step: which gradients there are, whether all are finite, scales of entries.

One reduction for all parameters of a mesh. Relied on by the step, the wrapper and the functions on gradients.
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
    """Find which parameters have a gradient anywhere, what it amounts to, and the scales that shrinkage needs.

    Shards of a gradient that others lack count as zeros. Where only some of a shard's replicas have one it counts as
    not finite: whichever way they went, they would part.

    Args:
        entries: on every rank those of the same parameters, in the same order.
        values: for every entry a number of its local gradient, which is NaN or infinite where that is not finite.
        carried: a scalar that is NaN where this rank knows of something else that is not finite.
        group: ranks among which the answer is settled as well, or None.

    Returns:
        A float64 scalar that is NaN if anything is not finite on any rank that shares a mesh with this one, or shares a
        mesh with one that does. Every entry's ``total`` is the sum of its values over its shards.
    """
    teams = by_team(entries)
    carried = carried.double().reshape(1)
    for team, found in teams:
        pieces = [carried]
        for entry in found:
            pieces.append(_flags(entry, values[entry]))
            if entry.shares_scales:
                pieces += [sums.reshape(-1) for sums in entry.root_sums(entry.grad)]
        total = torch.cat(pieces)
        team.sum(total, "screening")
        numbers = iter(torch.split(total, [len(piece) for piece in pieces]))
        next(numbers)
        # Zero times what is finite is zero, and times what is not is NaN.
        carried = total.mul(0).sum().reshape(1)
        for entry in found:
            value, present, parted = next(numbers).unbind()
            entry.total = torch.where(parted == 0, value / entry.sharding.replicas, torch.nan)
            entry.present = present > 0
            carried = carried + torch.where(parted == 0, 0.0, torch.nan)
            if entry.shares_scales:
                entry.set_scales([_as_scalar(next(numbers), entry) for _ in entry.views(entry.grad)])
    return settle([team for team, _ in teams[:-1]], carried, group)


def settle(teams: Sequence[Team], carried: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Carry a number that is NaN where something is wrong from mesh to mesh, so that all ranks of all have it."""
    for team in teams:
        team.sum(carried, "screening")
    if group is not None:
        dist.all_reduce(carried, group=group)
    return carried[0]


def flag_absent(entries: Sequence[Entry], found: Tensor) -> None:
    """Give every shard that is absent here, and may be absent everywhere, a flag of its own: absent parameters rest."""
    for entry in entries:
        if isinstance(entry, ShardedEntry) and not entry.has_gradient:
            assert entry.present is not None
            entry.found = torch.maximum(found, (~entry.present).float())


def _as_scalar(numbers: Tensor, entry: ShardedEntry) -> Tensor:
    return numbers if entry.layout != "vector" and entry.axes.stack is not None else numbers[0]


def _flags(entry: ShardedEntry, value: Tensor) -> Tensor:
    """The value, whether there is a gradient, and a number whose sum is zero where replicas agree on that."""
    sharding, me = entry.sharding, entry.team.member
    first = sharding.replica(me) == 0
    # Whole numbers, so that sums are exact; scattered, so that disagreements of several shards do not cancel.
    weight = 1 + sharding.shard(me) * 40503 % 65521
    parted = weight * entry.has_gradient * ((sharding.replicas if first else 0) - 1)
    present = value.new_full((1,), float(entry.has_gradient), dtype=torch.float64)
    return torch.cat([value.double().reshape(1), present, torch.full_like(present, parted)])
