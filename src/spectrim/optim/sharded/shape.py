"""Operator, scale and clip on sharded directions, for the library's optimizers and for the wrapper.

Owner ranks shape whole matrices, spikes are shaped on the shards, and one reduction gives the norms of all vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from spectrim.distributed.collectives import Team
from spectrim.distributed.owners import Loads
from spectrim.optim.grouping.layout import put_back
from spectrim.optim.rules.rule import Rule
from spectrim.optim.sharded.entry import ShardedEntry
from spectrim.optim.sharded.rounds import send_to_owners, unit_layout
from spectrim.optim.spectral.base import StepContext
from spectrim.optim.stepping.buckets import bucket_bytes, parts_of
from spectrim.optim.stepping.operate import keep, scale_factor, shape

__all__ = ["shape_round"]


def shape_round(
    team: Team,
    entries: Sequence[ShardedEntry],
    directions: Sequence[Tensor],
    loads: Loads,
    apply: Callable[[Sequence[Tensor]], None],
) -> Iterator[None]:
    """Shape one round's directions, which may be overwritten, and apply them; see :func:`~.rounds.run_rounds`."""
    rule = entries[0].rule
    results = list(directions)
    operated = rule.operator is not None and not rule.operator.gathers
    scaled = rule.operator is not None or rule.scale != "none"
    if rule.vector and rule.clip is not None:
        results = _clipped_vectors(team, entries, results, rule)
    elif operated:
        results = _shaped_in_place(team, entries, results, rule)
    if not rule.vector and (rule.clip is not None or (scaled and not operated)):
        exchange = send_to_owners(team, entries, results, dtype=rule.exchange or results[0].dtype, loads=loads)
        yield
        exchange.work(lambda _, found: _shaped(entries[0], found, operated=operated))
        yield
        results = exchange.results()
    apply(results)


def _shaped(entry: ShardedEntry, found: list[Tensor], *, operated: bool) -> list[Tensor]:
    """Shape whole matrices of one shape at their owner, a bucket at a time."""
    layout = unit_layout(entry.layout)
    results: list[Tensor] = []
    length = max(1, bucket_bytes(found[0]) // max(1, 4 * found[0].numel()))
    for start in range(0, len(found), length):
        stacked = torch.stack(found[start : start + length])
        parts = parts_of(stacked, layout, entry.split)
        (factor,) = shape(entry.rule, [parts], operated=operated)
        put_back([part.matrices for part in parts], stacked, layout, entry.split, leading=1)
        results += (stacked if factor == 1.0 else stacked.mul_(factor)).unbind()
    return results


def _shaped_in_place(
    team: Team, entries: Sequence[ShardedEntry], directions: Sequence[Tensor], rule: Rule
) -> list[Tensor]:
    """Apply an operator that works on shards, and its scale, to directions; update its state."""
    operator = rule.operator
    assert operator is not None
    grids, blocks, targets, states = [], [], [], []
    for entry, direction in zip(entries, directions, strict=True):
        grids += entry.grids
        blocks += entry.views(direction)
        targets += operator.state_of_parts(entry.state, [grid.shape for grid in entry.grids])
    states = [dict(target) for target in targets]
    shaped = operator.sharded(team, grids, blocks, states, StepContext(first=rule.first))
    owners = [entry for entry in entries for _ in entry.grids]
    for entry, target, state in zip(owners, targets, states, strict=True):
        keep(list(target.values()), list(state.values()), entry.found)
    results = []
    found = iter(zip(grids, shaped, strict=True))
    for entry, direction in zip(entries, directions, strict=True):
        made: list[Tensor] = []
        for _ in entry.parts:
            grid, (result, norm) = next(found)
            factor = scale_factor(rule, grid.shape, norm)
            if isinstance(factor, Tensor):
                factor = factor.to(result.dtype)[..., None, None]
            made.append(result * factor)
        results.append(torch.empty_like(direction))
        entry.fill(results[-1], made)
    return results


def _clipped_vectors(
    team: Team, entries: Sequence[ShardedEntry], directions: Sequence[Tensor], rule: Rule
) -> list[Tensor]:
    """Clip the norm of every direction, with one reduction for all norms."""
    assert rule.clip is not None
    squares = torch.stack(
        [
            torch.linalg.vector_norm(direction, dtype=torch.float64).square()
            * (entry.sharding.replica(team.member) == 0)
            for entry, direction in zip(entries, directions, strict=True)
        ]
    )
    team.sum(squares, "norms of vectors")
    factors = rule.clip.vector_factors(squares.sqrt(), StepContext(threshold=rule.threshold))
    if factors is None:
        return list(directions)
    return [d * factor.to(d.dtype) for d, factor in zip(directions, factors.unbind(), strict=True)]
