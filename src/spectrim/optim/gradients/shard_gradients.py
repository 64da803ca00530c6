"""Clipping and shrinking, in place, of sharded gradients.

Owner ranks clip whole matrices, as in a step; every rank shrinks the entries of its shard. One reduction at the end
combines the results of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from spectrim.distributed.collectives import Team
from spectrim.distributed.owners import Loads
from spectrim.operators import ShrinkForm
from spectrim.operators._stack import reading_is_free
from spectrim.optim.gradients.matrices import clipped_vector, map_matrices, squared_norm
from spectrim.optim.gradients.norms import largest_singular_value
from spectrim.optim.sharded.entry import ShardedEntry, by_team
from spectrim.optim.sharded.rounds import run_rounds, send_to_owners, unit_layout

__all__ = ["clip_shards", "shrink_shards"]


def clip_shards(
    entries: Sequence[ShardedEntry],
    clip: Callable[[Tensor, float | Tensor], Tensor],
    threshold: float | Tensor,
    *,
    form: str,
    vectors: bool,
) -> dict[ShardedEntry, Tensor]:
    """Clip screened gradients.

    Args:
        clip: clips one matrix to a threshold.
        form: "soft" or "hard", for vectors.
        vectors: also clip vectors by their norm.

    Returns:
        For every entry the largest singular value before clipping, or the norm of a vector; zero without a gradient.
    """
    taking = _taking(entries)
    found = {entry: _zero(entry) for entry in entries}
    for entry in taking:
        if entry.layout == "vector":
            assert entry.total is not None
            found[entry] = entry.total.sqrt()
            if vectors:
                _write(entry, clipped_vector(_exact(entry), found[entry], threshold, form))
    clipping = _Clipping(lambda matrix: clip(matrix, threshold), found)
    by_dtype: dict[torch.dtype, list[ShardedEntry]] = {}
    for entry in taking:
        if entry.layout == "vector":
            continue
        if entry.is_alone():
            found[entry], clipped = clipping.one(_exact(entry), entry)
            _write(entry, clipped)
        else:
            by_dtype.setdefault(entry.grad.dtype, []).append(entry)
    for alike in by_dtype.values():
        run_rounds(alike, clipping.step)
    for team, some in by_team(entry for entry in taking if entry.layout != "vector"):
        norms = torch.stack([found[entry] for entry in some])
        team.maximum(norms, "norms")
        found.update(zip(some, norms, strict=True))
    return found


class _Clipping:
    """Sends matrices to their owners, clips them there, and writes the results back to the shards.

    ``found`` gets the norms of the matrices that this rank owns.
    """

    def __init__(self, clip: Callable[[Tensor], Tensor], found: dict[ShardedEntry, Tensor]) -> None:
        self._clip = clip
        self._found = found
        self._loads: Loads = {}

    def one(self, matrix: Tensor, entry: ShardedEntry) -> tuple[Tensor, Tensor]:
        """The largest singular value of a matrix (or stack), and the clipped matrix."""
        layout = entry.layout if matrix.ndim == len(entry.sharding.shape) else unit_layout(entry.layout)
        exact = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        norm = largest_singular_value(exact, layout, entry.split)
        return norm, map_matrices(self._clip, exact, layout, entry.split) if exact.numel() else exact

    def step(self, team: Team, entries: list[ShardedEntry]) -> Iterator[None]:
        """One round; see :func:`~rounds.run_rounds`."""

        def work(indices: list[int], wholes: list[Tensor]) -> list[Tensor]:
            results = []
            for index, whole in zip(indices, wholes, strict=True):
                norm, clipped = self.one(whole, entries[index])
                self._found[entries[index]] = torch.maximum(self._found[entries[index]], norm)
                results.append(clipped)
            return results

        # Sent in the gradients' own dtype, since the result is rounded to it anyway.
        grads = [_served(entry) for entry in entries]
        exchange = send_to_owners(team, entries, grads, dtype=grads[0].dtype, loads=self._loads)
        yield
        exchange.work(work)
        yield
        for entry, clipped in zip(entries, exchange.results(), strict=True):
            _write(entry, clipped)


def shrink_shards(
    entries: Sequence[ShardedEntry], factor: float, form: ShrinkForm
) -> dict[ShardedEntry, tuple[Tensor, Tensor]]:
    """Shrink the entries of screened gradients.

    Returns:
        For every entry the mean entry scale and the share of energy removed; zeros without a gradient.
    """
    found = {entry: (_zero(entry), _zero(entry)) for entry in entries}
    for team, some in by_team(_taking(entries)):
        energies = []
        for entry in some:
            shrunk = entry.shrunk(_exact(entry), factor, form)
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


def _write(entry: ShardedEntry, result: Tensor) -> None:
    if entry.has_gradient:
        entry.grad.copy_(result if entry.found is None else torch.where(entry.found > 0, entry.grad, result))


def _zero(entry: ShardedEntry) -> Tensor:
    return torch.zeros((), device=entry.grad.device)
