"""Clipping and shrinking, in place, of sharded gradients.

Owner ranks clip whole matrices, as in a step; every rank shrinks the entries of its shard. One reduction at the end
combines the results of all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spectrim.distributed.collectives import Team
from spectrim.distributed.owners import Loads
from spectrim.kernels.lists import grouped
from spectrim.operators._stack import reading_is_free
from spectrim.optim.gradients.matrices import Clipping, squared_norm
from spectrim.optim.rules.rule import Shrink
from spectrim.optim.sharded.entry import ShardedEntry, by_team
from spectrim.optim.sharded.rounds import run_rounds, send_to_owners, unit_layout
from spectrim.optim.stepping.entries import Entry

__all__ = ["clip_shards", "shrink_shards"]


def clip_shards(entries: Sequence[ShardedEntry], clipping: Clipping) -> dict[ShardedEntry, Tensor]:
    """Clip screened gradients.

    Returns:
        For every entry the largest singular value before clipping if it is measured, or the norm of a vector; zero
        without a gradient.
    """
    taking = _taking(entries)
    found = {entry: _zero(entry) for entry in entries}
    for entry in taking:
        if entry.layout == "vector":
            assert entry.total is not None
            found[entry] = entry.total.sqrt()
            _write(entry, clipping.clipped_vector(_exact(entry), found[entry]))
        elif entry.is_alone():
            found[entry], clipped = clipping.clipped(_exact(entry), entry.layout, entry.split)
            _write(entry, clipped)
    loads: Loads = {}
    matrices = [entry for entry in taking if entry.layout != "vector"]
    sent = [entry for entry in matrices if not entry.is_alone()]
    for alike in grouped(sent, lambda entry: entry.grad.dtype).values():
        run_rounds(alike, lambda team, some: _clip_round(team, some, clipping, found, loads))
    for team, some in by_team(matrices if clipping.measure else ()):
        norms = torch.stack([found[entry] for entry in some])
        team.maximum(norms, "norms")
        found.update(zip(some, norms, strict=True))
    return found


def _clip_round(
    team: Team, entries: list[ShardedEntry], clipping: Clipping, found: dict[ShardedEntry, Tensor], loads: Loads
) -> Iterator[None]:
    """One round (:func:`~rounds.run_rounds`): send matrices to their owners, clip them there, write to the shards.

    ``found`` gets the norms of the matrices that this rank owns."""

    def work(indices: list[int], wholes: list[Tensor]) -> list[Tensor]:
        results = []
        for index, whole in zip(indices, wholes, strict=True):
            entry, exact = entries[index], whole.to(torch.promote_types(whole.dtype, torch.float32))
            norm, clipped = clipping.clipped(exact, unit_layout(entry.layout), entry.split)
            assert clipped is not None
            found[entry] = torch.maximum(found[entry], norm)
            results.append(clipped)
        return results

    # Sent in the gradients' own dtype, since the result is rounded to it anyway.
    grads = [_served(entry) for entry in entries]
    exchange = send_to_owners(team, entries, grads, dtype=grads[0].dtype, loads=loads)
    yield
    exchange.work(work)
    yield
    for entry, clipped in zip(entries, exchange.results(), strict=True):
        _write(entry, clipped)


def shrink_shards(entries: Sequence[ShardedEntry], shrink: Shrink) -> dict[Entry, tuple[Tensor, Tensor]]:
    """Shrink the entries of screened gradients.

    Returns:
        For every entry the mean entry scale and the share of energy removed; zeros without a gradient.
    """
    found: dict[Entry, tuple[Tensor, Tensor]] = {entry: (_zero(entry), _zero(entry)) for entry in entries}
    for team, some in by_team(_taking(entries)):
        energies = []
        for entry in some:
            shrunk = entry.shrunk(_exact(entry), shrink)
            # Count each shard once, not once per replica.
            energies.append(squared_norm(shrunk) * (entry.sharding.replica(team.member) == 0))
            _write(entry, shrunk)
        after = torch.stack(energies)
        team.sum(after, "energies")
        for entry, energy in zip(some, after, strict=True):
            assert entry.total is not None
            assert entry.mean_scale is not None
            before = entry.total
            found[entry] = entry.mean_scale, torch.where(before > 0, 1 - energy / before, 0)
    return found


def _taking(entries: Sequence[ShardedEntry]) -> list[ShardedEntry]:
    """The entries whose gradient is present, finite and not zero; the same on every rank.

    If reading would block, all entries with a skip flag each."""
    some = []
    for entry in entries:
        assert entry.total is not None
        assert entry.present is not None
        taken = entry.present & entry.total.isfinite()
        if reading_is_free(taken):
            if not (taken and entry.total > 0):
                continue
        else:
            entry.found = (~taken).float()
        some.append(entry)
    return some


def _served(entry: ShardedEntry) -> Tensor:
    # Operators get zeros instead of a gradient that is not finite.
    return entry.grad if entry.found is None else torch.where(entry.found > 0, 0.0, entry.grad)


def _exact(entry: ShardedEntry) -> Tensor:
    grad = _served(entry)
    return grad.to(torch.promote_types(grad.dtype, torch.float32))


def _write(entry: ShardedEntry, result: Tensor | None) -> None:
    if entry.has_gradient and result is not None:
        entry.grad.copy_(result if entry.found is None else torch.where(entry.found > 0, entry.grad, result))


def _zero(entry: ShardedEntry) -> Tensor:
    return torch.zeros((), device=entry.grad.device)
