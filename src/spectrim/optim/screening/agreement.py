"""Checks that all ranks have the same options and parameters before they exchange messages.

Ranks that differ would hang, or silently train different replicas. The first step compares everything; later steps
compare a digest where reading it does not block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spectrim.distributed.collectives import Team
from spectrim.operators._stack import reading_is_free
from spectrim.optim.sharded.entry import ShardedEntry, by_team
from spectrim.optim.stepping.entries import parameter_name

__all__ = ["Agreement", "any_rank", "raise_nonfinite"]


class Agreement:
    """Compares the options and parameters of one optimizer between its ranks."""

    def __init__(self) -> None:
        self._met: set[Team] = set()

    def check(self, groups: Sequence[Mapping[str, Any]], entries: Sequence[ShardedEntry]) -> None:
        """Compare options and parameters with the other ranks.

        Raises:
            ValueError: on every rank; the message names a difference and the ranks.
        """
        for team, found in by_team(entries):
            if team.size == 1:
                continue
            first = team not in self._met
            if first:
                digests = team.gather_objects(_digest(_described(groups, found)))
                agreed = len(set(digests)) == 1
            else:
                agreed = not reading_is_free(found[0].grad) or _agrees(team, _described(groups, found), found[0].grad)
            if not agreed:
                _raise_difference(team, groups, found)
            self._met.add(team)


def any_rank(entries: Sequence[ShardedEntry], flag: bool) -> bool:
    """True if the flag is True on any rank of the meshes of these parameters.

    Reads the device. Every rank calls this with its shards of the same parameters.
    """
    for team, found in by_team(entries):
        # The result of one mesh goes into the next, so that ranks of all meshes get it.
        number = torch.full((), float(flag), device=found[0].grad.device)
        team.maximum(number, "agreement")
        flag = bool(number)
    return flag


def raise_nonfinite(bad: tuple[str, float] | None, entries: Sequence[ShardedEntry]) -> None:
    """Raise on every rank if any rank has a gradient that is not finite; otherwise ranks would wait for each other.

    Args:
        bad: name and magnitude of a gradient of this rank that is not finite, or None.

    Raises:
        FloatingPointError: some rank has such a gradient.
    """
    if not any_rank(entries, bad is not None):
        return
    which = "a gradient of another rank" if bad is None else f"the gradient of {bad[0]}"
    raise FloatingPointError(
        f"{which} is not finite{'' if bad is None else f' (largest magnitude {bad[1]})'}; no parameter was updated. "
        f'on_nonfinite="skip" skips such a step instead.'
    )


def _described(groups: Sequence[Mapping[str, Any]], entries: Sequence[ShardedEntry]) -> list[tuple[str, Any]]:
    """(name, value) pairs that must be equal on all ranks: options of groups, and layouts of parameters."""
    described: list[tuple[str, Any]] = []
    for index in dict.fromkeys(entry.position[0] for entry in entries):
        for key, value in sorted(groups[index].items()):
            if key not in ("params", "param_names") and _is_plain(value):
                described.append((f"{key} of group {index}", value))
    for entry in entries:
        name = parameter_name(groups, entry.position)
        layout = (entry.sharding, entry.layout, str(entry.parameter.dtype))
        described.append((f"parameter {name!r}", layout))
    return described


def _is_plain(value: object) -> bool:
    """True if a value's ``repr`` is the same in every process. Groups of other optimizers may hold any object."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _digest(described: Sequence[tuple[str, Any]]) -> bytes:
    return hashlib.sha256(repr(described).encode()).digest()


def _agrees(team: Team, described: Sequence[tuple[str, Any]], like: Tensor) -> bool:
    """True if all ranks have the same digest: its first 48 bits, which float64 holds exactly, are equal."""
    digest = int.from_bytes(_digest(described)[:6], "big")
    largest = torch.tensor([digest, -digest], dtype=torch.float64, device=like.device)
    team.maximum(largest, "agreement")
    return bool(largest.sum() == 0)


def _raise_difference(team: Team, groups: Sequence[Mapping[str, Any]], entries: Sequence[ShardedEntry]) -> None:
    everyone = team.gather_objects([(name, repr(value)) for name, value in _described(groups, entries)])
    names = dict.fromkeys(name for described in everyone for name, _ in described)
    for name in names:
        values: dict[str, list[int]] = {}
        for member, described in enumerate(everyone):
            values.setdefault(dict(described).get(name, "missing"), []).append(member)
        if len(values) > 1:
            found = "; ".join(f"{value} on ranks {_listed(members)}" for value, members in values.items())
            raise ValueError(f"the ranks of an optimizer differ in {name}: {found}. Expected the same on every rank")
    raise ValueError("the ranks of an optimizer list their parameters in different orders: expected one order")


def _listed(members: Sequence[int]) -> str:
    return ", ".join(map(str, members[:8])) + (", ..." if len(members) > 8 else "")
