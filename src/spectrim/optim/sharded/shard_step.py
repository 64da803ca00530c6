"""The step of shards whose rule needs other ranks: *prepare* the gradients, compute base directions, then *shape* and
*apply* them with :mod:`~spectrim.optim.sharded.shape`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spectrim.distributed.collectives import Team
from spectrim.distributed.owners import Loads
from spectrim.kernels.lists import grouped
from spectrim.optim.rules.rule import Shrink
from spectrim.optim.sharded.entry import ShardedEntry
from spectrim.optim.sharded.rounds import run_rounds, send_to_owners, unit_layout
from spectrim.optim.sharded.shape import shape_round
from spectrim.optim.stepping.entries import by_flag, kind_of
from spectrim.optim.stepping.step import apply_to, bound_norms, corrected, directed, pre_clip, step_adamw

__all__ = ["step_shards"]


def step_shards(entries: Sequence[ShardedEntry]) -> None:
    """Step all entries. Every rank calls this with its shards of the same parameters, in the same order.

    Args:
        entries: of any rules. Their state's "step" already counts this step.
    """
    # One account for all rules, so that the work of a whole step is spread evenly over the owners.
    loads: Loads = {}
    for same in grouped(entries, kind_of).values():
        run_rounds(same, lambda team, some: _round(team, some, loads))


def _round(team: Team, entries: list[ShardedEntry], loads: Loads) -> Iterator[None]:
    rule = entries[0].rule
    grads = [_prepared(entry) for entry in entries]
    if rule.pre_clip is not None:
        exchange = send_to_owners(team, entries, grads, dtype=rule.exchange or grads[0].dtype, loads=loads)
        yield
        exchange.work(lambda _, wholes: [_pre_clipped(entries[0], whole) for whole in wholes])
        yield
        grads = exchange.results()
    if rule.direction.corrects:
        grads = _corrected(team, entries, grads)
    filled = [(entry, grad) for entry, grad in zip(entries, grads, strict=True) if entry.parameter.numel()]
    given = dict(filled)
    some = by_flag([entry for entry, _ in filled])
    if rule.is_adamw:
        some = [alike for alike in some if not step_adamw(alike, [given[entry] for entry in alike])]
    directions = {entry: torch.empty_like(grad, memory_format=torch.contiguous_format) for entry, grad in filled}
    for alike in some:
        directed(alike, [given[entry] for entry in alike], [directions[entry] for entry in alike])
    if rule.is_adamw:
        for alike in some:
            apply_to(alike, [directions[entry] for entry in alike])
        return
    results = [directions.get(entry, grad) for entry, grad in zip(entries, grads, strict=True)]
    del grads, given, filled, directions
    if rule.shrink_direction is not None:
        results = _shrunk_directions(team, entries, results, rule.shrink_direction)
    if not rule.still:
        yield from shape_round(team, entries, results, loads, lambda updates: apply_to(entries, updates))


def _prepared(entry: ShardedEntry) -> Tensor:
    """The gradient in float32 or wider, negated and shrunk as the rule asks."""
    rule = entry.rule
    exact = entry.grad.to(torch.promote_types(entry.parameter.dtype, torch.float32))
    if rule.maximize:
        exact = -exact
    if rule.shrink_gradient is None:
        return exact
    if not entry.shares_scales:
        entry.set_scales(entry.root_sums(exact))
    return entry.shrunk(exact, rule.shrink_gradient)


def _corrected(team: Team, entries: Sequence[ShardedEntry], grads: Sequence[Tensor]) -> list[Tensor]:
    """Corrected gradients in new tensors, the norm of each logical matrix at most 1; one reduction for all norms."""
    results = {entry: torch.empty_like(grad) for entry, grad in zip(entries, grads, strict=True)}
    given = dict(zip(entries, grads, strict=True))
    for alike in by_flag(entry for entry in entries if entry.parameter.numel()):
        corrected(alike, [given[entry] for entry in alike], [results[entry] for entry in alike])
    sums = [entry.sums(result, _squares) for entry, result in results.items()]
    for (entry, result), totals in zip(results.items(), _summed(team, sums, "norms of gradients"), strict=True):
        blocks = entry.views(result)
        for block, total in zip(blocks, totals, strict=True):
            bound_norms(block, entry.of_rank(total).sqrt())
        entry.fill(result, blocks)
    return list(results.values())


def _squares(block: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(block, dim=(-2, -1)[-block.ndim :], dtype=torch.float64)
    return norms.square()


def _summed(team: Team, sums: Sequence[Sequence[Tensor]], purpose: str) -> list[list[Tensor]]:
    """The totals over ranks of every entry's numbers, with one message."""
    total = torch.cat([number.reshape(-1) for found in sums for number in found])
    team.sum(total, purpose)
    numbers = iter(torch.split(total, [number.numel() for found in sums for number in found]))
    return [[next(numbers).view(number.shape) for number in found] for found in sums]


def _shrunk_directions(
    team: Team, entries: Sequence[ShardedEntry], directions: Sequence[Tensor], shrink: Shrink
) -> list[Tensor]:
    sums = [entry.root_sums(direction) for entry, direction in zip(entries, directions, strict=True)]
    for entry, found in zip(entries, _summed(team, sums, "scales"), strict=True):
        entry.set_scales(found)
    return [entry.shrunk(d, shrink) for entry, d in zip(entries, directions, strict=True)]


def _pre_clipped(entry: ShardedEntry, whole: Tensor) -> Tensor:
    """Pre-clip one whole gradient at its owner."""
    clipped = whole.unsqueeze(0).clone()
    pre_clip(clipped, entry.rule, unit_layout(entry.layout), entry.split)
    return clipped[0]
