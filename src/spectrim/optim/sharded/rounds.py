"""Rounds of whole-matrix work: each has as many matrices as fit in memory at their owners, and rounds overlap so that
one round's messages travel while another is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from spectrim.distributed.collectives import Team
from spectrim.distributed.owners import Loads, OwnerExchange, exchange_rounds
from spectrim.optim.grouping.layout import Layout
from spectrim.optim.sharded.entry import AnyShard, ShardedEntry, by_team

__all__ = ["run_rounds", "send_to_owners", "unit_layout"]


def run_rounds(entries: Sequence[AnyShard], step: Callable[[Team, list[AnyShard]], Iterator[None]]) -> None:
    """Run a step on all entries. Every rank calls this with its shards of the same parameters, in the same order.

    Args:
        step: the work of one round, on entries of one team. It yields after posting a message, before waiting for it.
    """
    for team, found in by_team(entries):
        together = exchange_rounds(found, lambda entry: entry.sharding.shape, team.size)
        _interleave([step(team, some) for some in together])


def send_to_owners(
    team: Team, entries: Sequence[ShardedEntry], tensors: Sequence[Tensor], *, dtype: torch.dtype, loads: Loads
) -> OwnerExchange:
    """Send one local tensor of every entry to the owners of its matrices.

    Args:
        tensors: all of one dtype, each with its entry's local shape.
        dtype: dtype of the messages.
    """
    stacks = [entry.layout in ("stack", "transposed_stack") for entry in entries]
    exchange = OwnerExchange(team, [entry.sharding for entry in entries], stacks, dtype, loads)
    exchange.send(tensors)
    return exchange


def unit_layout(layout: Layout) -> Layout:
    """The layout of the tensors that an owner receives: of one matrix, if the parameter is a stack."""
    single: dict[Layout, Layout] = {"stack": "matrix", "transposed_stack": "transposed"}
    return single.get(layout, layout)


def _interleave(rounds: Sequence[Iterator[None]]) -> None:
    """Advance rounds in turn, each one message behind its predecessor, so that messages overlap with computation."""
    waiting = list(rounds)[::-1]
    under_way: list[Iterator[None]] = []
    while waiting or under_way:
        if waiting:
            under_way.insert(0, waiting.pop())
        under_way = [step for step in under_way if next(step, _FINISHED) is not _FINISHED]


_FINISHED = object()
