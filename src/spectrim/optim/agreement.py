"""Whether all ranks mean the same step: compared before they wait for each other.

Ranks whose options or parameters differ would send different messages, and hang or, worse, go on with replicas that
part. The first step compares everything; later ones compare the options' digest where reading it costs nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spectrim.distributed.collectives import Team
from spectrim.operators._stack import reading_is_free
from spectrim.optim.entries import parameter_name
from spectrim.optim.sharded import ShardedEntry, by_team

__all__ = ["Agreement"]

#: Digests are compared as numbers this small so that sums of their squares over all ranks are exact in float64.
DIGITS = 3
DIGIT_BITS = 12


class Agreement:
    """What ranks have agreed on so far, for one optimizer."""

    def __init__(self) -> None:
        self._met: set[tuple[Any, ...]] = set()

    def check(self, groups: Sequence[Mapping[str, Any]], entries: Sequence[ShardedEntry]) -> None:
        """Compare options and parameters with the other ranks.

        Raises:
            ValueError: on every rank, naming what differs and on which ranks.
        """
        for team, found in by_team(entries):
            if team.size == 1:
                continue
            first = team.key not in self._met
            if first:
                digests = team.gather_objects(_digest(_described(groups, found)))
                agreed = len(set(digests)) == 1
            else:
                agreed = not reading_is_free(found[0].grad) or _agrees(team, _described(groups, found), found[0].grad)
            if not agreed:
                _raise_difference(team, groups, found)
            self._met.add(team.key)


def _described(groups: Sequence[Mapping[str, Any]], entries: Sequence[ShardedEntry]) -> list[tuple[str, Any]]:
    """What must be the same everywhere, each under the name that a message would give it."""
    described: list[tuple[str, Any]] = []
    for index in dict.fromkeys(entry.position[0] for entry in entries):
        for key, value in sorted(groups[index].items()):
            if key not in ("params", "param_names") and not isinstance(value, Tensor):
                described.append((f"{key} of group {index}", value))
    for entry in entries:
        name = parameter_name(groups, entry.position)
        layout = (entry.sharding, entry.role, entry.layout, str(entry.parameter.dtype))
        described.append((f"parameter {name!r}", layout))
    return described


def _digest(described: Sequence[tuple[str, Any]]) -> bytes:
    return hashlib.sha256(repr(described).encode()).digest()


def _agrees(team: Team, described: Sequence[tuple[str, Any]], like: Tensor) -> bool:
    """Whether all have one digest: then, and only then, P Σd² = (Σd)²."""
    whole = int.from_bytes(_digest(described)[:8], "big")
    digits = [whole >> (DIGIT_BITS * place) & ((1 << DIGIT_BITS) - 1) for place in range(DIGITS)]
    numbers = torch.tensor([*digits, *(digit**2 for digit in digits)], dtype=torch.float64, device=like.device)
    team.sum(numbers, "agreement")
    found = numbers.tolist()
    return all(team.size * square == total**2 for total, square in zip(found[:DIGITS], found[DIGITS:], strict=True))


def _raise_difference(team: Team, groups: Sequence[Mapping[str, Any]], entries: Sequence[ShardedEntry]) -> None:
    everyone = team.gather_objects([(name, repr(value)) for name, value in _described(groups, entries)])
    names = dict.fromkeys(name for described in everyone for name, _ in described)
    for name in names:
        values: dict[str, list[int]] = {}
        for member, described in enumerate(everyone):
            values.setdefault(dict(described).get(name, "missing"), []).append(member)
        if len(values) > 1:
            found = "; ".join(f"{value} on ranks {_listed(members)}" for value, members in values.items())
            raise ValueError(f"the ranks of an optimizer differ in {name}: {found}. They must agree before they step.")
    raise ValueError("the ranks of an optimizer list their parameters in different orders; they must agree")


def _listed(members: Sequence[int]) -> str:
    return ", ".join(map(str, members[:8])) + (", ..." if len(members) > 8 else "")
