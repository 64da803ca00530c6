"""Decides if a step is taken: it is skipped if any gradient is not finite.

A gradient whose square overflows counts as not finite too: the second moment would become infinite, and the entry would
never move again.

On the host the decision is made at once. On a device it is a flag, which every kernel of the step reads, so that the
host never waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spectrim.kernels.lists import grouped
from spectrim.kernels.magnitudes import largest_magnitudes
from spectrim.kernels.settling import LIMITS, settle
from spectrim.operators._stack import reading_is_free
from spectrim.optim.screening.agreement import raise_nonfinite
from spectrim.optim.screening.shard_screening import flag_absent, screen_shards
from spectrim.optim.screening.skips import SkipWatch
from spectrim.optim.sharded.entry import ShardedEntry
from spectrim.optim.stepping.entries import Entry, parameter_name

__all__ = ["GradScale", "screen"]

#: A GradScaler's scale, by which gradients must be divided, and its overflow flag; each may be None.
GradScale = tuple[Tensor | None, Tensor | None]


def screen(
    entries: Sequence[Entry],
    groups: Sequence[Mapping[str, Any]],
    watch: SkipWatch,
    *,
    scaler: GradScale = (None, None),
    process_group: dist.ProcessGroup | None = None,
) -> list[Entry]:
    """Decide if a step is taken, and update the parameters' counts of steps and skips.

    Args:
        entries: all parameters of the step, on any devices.
        groups: the param groups.
        watch: warns when steps are skipped for too long.
        scaler: scale and overflow flag of a GradScaler.
        process_group: ranks that must skip together in addition to those that share a mesh.

    Returns:
        The entries to step, with their skip flags set; empty if the host knows that the step is skipped.

    Raises:
        FloatingPointError: a gradient is not finite and its group has ``on_nonfinite="raise"``. No parameter or state
            is changed then.
    """
    if not entries:
        return []
    scale, given = scaler
    if scale is not None:
        inverse = scale.double().reciprocal().float()
        for device, some in _by_device(entries):
            torch._foreach_mul_([entry.grad for entry in some], inverse.to(device, non_blocking=True))
    by_device = [(some, largest_magnitudes([entry.grad for entry in some])) for _, some in _by_device(entries)]
    sharded = [entry for entry in entries if isinstance(entry, ShardedEntry)]
    carried: Tensor | None = None
    if sharded:
        sizes = {entry: size for some, sizes in by_device for entry, size in zip(some, sizes.unbind(), strict=True)}
        others = [size for entry, size in sizes.items() if not isinstance(entry, ShardedEntry)]
        device = sharded[0].grad.device
        # Zero times a magnitude is zero, or NaN if the magnitude is not finite.
        wrong = _sum([size * 0 for size in others], device) if others else torch.zeros((), device=device)
        carried = screen_shards(sharded, sizes, wrong, process_group)
        by_device = [(some, _of_whole(some, largest)) for some, largest in by_device]
    found = _Screening(by_device, sharded, groups, watch, carried, given)
    return found.on_host() if all(reading_is_free(sizes) for _, sizes in by_device) else found.on_device()


@dataclass(frozen=True)
class _Screening:
    """What decides if a step is taken.

    Attributes:
        by_device: the entries of each device and the largest magnitude of each gradient; of a shard's, over all ranks.
        carried: NaN if a gradient on any rank is not finite; None without shards.
        given: the overflow flag of a GradScaler, or None.
    """

    by_device: Sequence[tuple[list[Entry], Tensor]]
    sharded: Sequence[ShardedEntry]
    groups: Sequence[Mapping[str, Any]]
    watch: SkipWatch
    carried: Tensor | None
    given: Tensor | None

    def on_host(self) -> list[Entry]:
        """The entries to step, by numbers that can be read without waiting."""
        numbers = self._numbers()
        bad = [entry for entry, size in numbers.items() if not size < _limit([entry])]
        self._raise_if_asked(numbers)
        for entry in bad:
            entry.state["skipped"] += 1
        elsewhere = self.carried is not None and not bool(self.carried.isfinite())
        if bad or elsewhere or (self.given is not None and bool(self.given)):
            self.watch.skipped(self.groups, list(numbers))
            return []
        self.watch.taken()
        present = [entry for entry in numbers if not isinstance(entry, ShardedEntry) or bool(entry.present)]
        if all(entry.rule.still and not numbers[entry] for entry in present):
            # torch's checkpointing takes such a step, with lr=0 and zero gradients, to initialise the state. It must
            # not count as a step.
            return []
        for entry in present:
            entry.state["step"] += 1
        return present

    def on_device(self) -> list[Entry]:
        """All entries, each with its skip flag."""
        everything = [entry for some, _ in self.by_device for entry in some]
        if any(entry.rule.raises for entry in everything):
            self._raise_if_asked(self._numbers())
        first = self.by_device[0][1].device
        flags: list[Tensor] = []
        if self.carried is not None:
            flags.append(self.carried.isnan().float())
        if self.given is not None:
            flags.append(self.given.float().reshape(()))
        if all(entry.rule.still for entry in everything):
            nothing = [(~(sizes.amax() > 0)).float() for _, sizes in self.by_device]
            flags.append(torch.stack([flag.to(first, non_blocking=True) for flag in nothing]).amin())
        flags += [(~torch.lt(sizes.amax(), _limit(some))).float() for some, sizes in self.by_device[1:]]
        on_first = [flag.to(first, non_blocking=True) for flag in flags]
        found = reduce(torch.maximum, on_first) if on_first else None
        for some, sizes in self.by_device:
            others = None if found is None else found.to(sizes.device, non_blocking=True)
            absent = [entry for entry in some if isinstance(entry, ShardedEntry) and not entry.has_gradient]
            elsewhere = set(absent)
            counts = [entry.state["step"] for entry in some if entry not in elsewhere]
            blamed = [entry.state["skipped"] for entry in some]
            found = settle(sizes, counts, blamed, others, limit=_limit(some))
            for entry in some:
                entry.found = found
            flag_absent(absent, found)
            for entry in absent:
                assert entry.found is not None
                entry.state["step"] += 1 - entry.found
        assert found is not None
        self.watch.flagged(found, self.groups, everything)
        return everything

    def _numbers(self) -> dict[Entry, float]:
        """The largest magnitude of every gradient, read from the devices."""
        return {e: size for some, sizes in self.by_device for e, size in zip(some, sizes.tolist(), strict=True)}

    def _raise_if_asked(self, numbers: Mapping[Entry, float]) -> None:
        if any(entry.rule.raises for entry in numbers):
            bad = ((e, size) for e, size in numbers.items() if e.rule.raises and not size < _limit([e]))
            entry, size = next(bad, (None, 0.0))
            named = None if entry is None else (parameter_name(self.groups, entry.position), size)
            raise_nonfinite(named, self.sharded)


def _limit(entries: Sequence[Entry]) -> float:
    wide = all(entry.parameter.dtype == torch.float64 and not entry.rule.narrow_state for entry in entries)
    return LIMITS[torch.float64 if wide else torch.float32]


def _of_whole(entries: Sequence[Entry], sizes: Tensor) -> Tensor:
    """Magnitudes, where those of shards are replaced by the totals over all ranks."""
    found = []
    for entry, size in zip(entries, sizes.unbind(), strict=True):
        total = entry.total if isinstance(entry, ShardedEntry) else None
        found.append(size.double() if total is None else total)
    return torch.stack(found)


def _sum(numbers: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.stack([number.to(device=device, dtype=torch.float64, non_blocking=True) for number in numbers]).sum()


def _by_device(entries: Iterable[Entry]) -> list[tuple[torch.device, list[Entry]]]:
    return list(grouped(entries, lambda entry: entry.grad.device).items())
