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
from spectrim.optim.sharded.entry import ShardedEntry, by_team
from spectrim.optim.stepping.entries import parameter_name

__all__ = ["Agreement", "any_rank", "raise_nonfinite"]

#: Digests are compared as numbers this small so that sums of their squares over all ranks are exact in float64.
DIGITS = 3
DIGIT_BITS = 12


class Agreement:
    """What ranks have agreed on so far, for one optimizer."""

    def __init__(self) -> None:
        self._met: set[Team] = set()

    def check(self, groups: Sequence[Mapping[str, Any]], entries: Sequence[ShardedEntry]) -> None:
        """Compare options and parameters with the other ranks.

        Raises:
            ValueError: on every rank, naming what differs and on which ranks.
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
    """Whether a flag is up on any rank that shares a parameter with this one, or in a row or column of meshes with it.

    Reads the device. Every rank calls this with its shards of the same parameters.
    """
    for team, found in by_team(entries):
        # Carried on from mesh to mesh.
        number = torch.full((), float(flag), device=found[0].grad.device)
        team.maximum(number, "agreement")
        flag = bool(number)
    return flag


def raise_nonfinite(bad: tuple[str, float] | None, entries: Sequence[ShardedEntry]) -> None:
    """Stop a step before anything moves, on every rank, because a gradient of any is not finite.

    Args:
        bad: name and squared norm of one here, or None. Ranks that went on would wait for the one that stops.

    Raises:
        FloatingPointError: there is one.
    """
    if not any_rank(entries, bad is not None):
        return
    which = "a gradient of another rank" if bad is None else f"the gradient of {bad[0]}"
    raise FloatingPointError(
        f"{which} is not finite{'' if bad is None else f' (squared norm {bad[1]})'}; no parameter was updated. "
        f'on_nonfinite="skip" would leave this one as it is and go on.'
    )


def _described(groups: Sequence[Mapping[str, Any]], entries: Sequence[ShardedEntry]) -> list[tuple[str, Any]]:
    """What must be the same everywhere, each under the name that a message would give it."""
    described: list[tuple[str, Any]] = []
    for index in dict.fromkeys(entry.position[0] for entry in entries):
        for key, value in sorted(groups[index].items()):
            if key not in ("params", "param_names") and _is_plain(value):
                described.append((f"{key} of group {index}", value))
    for entry in entries:
        name = parameter_name(groups, entry.position)
        layout = (entry.sharding, entry.role, entry.layout, str(entry.parameter.dtype))
        described.append((f"parameter {name!r}", layout))
    return described


def _is_plain(value: object) -> bool:
    """Whether a value says the same in every process: groups of other optimizers may hold anything."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


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
