"""Decides if a step is taken: it is skipped if any gradient is not finite.

A gradient whose square overflows counts as not finite too: the second moment would become infinite, and the entry would
never move again.

On the host the decision is made at once. On a device it is a flag, which every kernel of the step reads, so that the
host never waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

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
    sizes: dict[Entry, Tensor] = {}
    by_device: list[tuple[list[Entry], Tensor]] = []
    for _, some in _by_device(entries):
        largest = largest_magnitudes([entry.grad for entry in some])
        by_device.append((some, largest))
    sharded = [entry for entry in entries if isinstance(entry, ShardedEntry)]
    carried: Tensor | None = None
    if sharded:
        for some, largest in by_device:
            sizes.update(zip(some, largest.unbind(), strict=True))
        others = [size for entry, size in sizes.items() if not isinstance(entry, ShardedEntry)]
        device = sharded[0].grad.device
        # Zero times a magnitude is zero, or NaN if the magnitude is not finite.
        wrong = _sum([size * 0 for size in others], device) if others else torch.zeros((), device=device)
        carried = screen_shards(sharded, sizes, wrong, process_group)
        by_device = [(some, _of_whole(some, largest)) for some, largest in by_device]
    if all(reading_is_free(largest) for _, largest in by_device):
        return _on_host(by_device, sharded, groups, watch, carried, given)
    return _on_device(by_device, sharded, groups, watch, carried, given)


def _numbers(by_device: Sequence[tuple[list[Entry], Tensor]]) -> dict[Entry, float]:
    """The largest magnitude of every gradient, read from the devices."""
    return {entry: size for some, sizes in by_device for entry, size in zip(some, sizes.tolist(), strict=True)}


def _on_host(
    by_device: Sequence[tuple[list[Entry], Tensor]],
    sharded: Sequence[ShardedEntry],
    groups: Sequence[Mapping[str, Any]],
    watch: SkipWatch,
    carried: Tensor | None,
    given: Tensor | None,
) -> list[Entry]:
    numbers = _numbers(by_device)
    bad = [entry for entry, size in numbers.items() if not size < _limit([entry])]
    _raise_if_asked(numbers, groups, sharded)
    for entry in bad:
        entry.state["skipped"] += 1
    if bad or (carried is not None and not bool(carried.isfinite())) or (given is not None and bool(given)):
        watch.skipped(groups, list(numbers))
        return []
    watch.taken()
    present = [entry for entry in numbers if not isinstance(entry, ShardedEntry) or bool(entry.present)]
    if all(entry.rule.still and not numbers[entry] for entry in present):
        # torch's checkpointing takes such a step, with lr=0 and zero gradients, to initialise the state. It must not
        # count as a step.
        return []
    for entry in present:
        entry.state["step"] += 1
    return present


def _on_device(
    by_device: Sequence[tuple[list[Entry], Tensor]],
    sharded: Sequence[ShardedEntry],
    groups: Sequence[Mapping[str, Any]],
    watch: SkipWatch,
    carried: Tensor | None,
    given: Tensor | None,
) -> list[Entry]:
    everything = [entry for some, _ in by_device for entry in some]
    if any(entry.rule.raises for entry in everything):
        _raise_if_asked(_numbers(by_device), groups, sharded)
    first = by_device[0][1].device
    flags: list[Tensor] = []
    if carried is not None:
        flags.append(carried.isnan().float())
    if given is not None:
        flags.append(given.float().reshape(()))
    if all(entry.rule.still for entry in everything):
        nothing = [(~(sizes.amax() > 0)).float() for _, sizes in by_device]
        flags.append(torch.stack([flag.to(first, non_blocking=True) for flag in nothing]).amin())
    if len(by_device) > 1:
        flags += [(~torch.lt(sizes.amax(), _limit(some))).float() for some, sizes in by_device[1:]]
    others: Tensor | None = None
    for flag in flags:
        flag = flag.to(first, non_blocking=True)
        others = flag if others is None else torch.maximum(others, flag)
    found: Tensor | None = None
    for some, sizes in by_device:
        if found is not None:
            others = found.to(sizes.device, non_blocking=True)
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
    watch.flagged(found, groups, everything)
    return everything


def _raise_if_asked(
    numbers: Mapping[Entry, float], groups: Sequence[Mapping[str, Any]], sharded: Sequence[ShardedEntry]
) -> None:
    if any(entry.rule.raises for entry in numbers):
        bad = ((e, size) for e, size in numbers.items() if e.rule.raises and not size < _limit([e]))
        entry, size = next(bad, (None, 0.0))
        raise_nonfinite(None if entry is None else (parameter_name(groups, entry.position), size), sharded)


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
    found: dict[torch.device, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.grad.device, []).append(entry)
    return list(found.items())
