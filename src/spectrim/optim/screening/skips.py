"""Warns when too many steps in a row are skipped. It never waits for the device."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spectrim.optim.stepping.entries import Entry, parameter_name

__all__ = ["PATIENCE", "SkipWatch"]

#: Skipped steps in a row before the warning.
PATIENCE = 20
#: Steps between two readings from a device, by which a warning may be late.
WINDOW = 10


class SkipWatch:
    """Counts the steps that an optimizer skips in a row. It is not part of a checkpoint."""

    def __init__(self) -> None:
        self._in_a_row = 0
        self._before: list[float] | None = None
        self._steps = 0
        self._total: Tensor | None = None
        self._total_read = 0.0
        self._under_way: tuple[Tensor, Any, list[tuple[int, int]]] | None = None

    def taken(self) -> None:
        """Count a step that the host knows was taken."""
        self._in_a_row = 0

    def skipped(self, groups: Sequence[Mapping[str, Any]], entries: Sequence[Entry]) -> None:
        """Count a step that the host knows was skipped, after the entries' "skipped" were updated."""
        self._in_a_row += 1
        if self._in_a_row == PATIENCE:
            counts = [float(entry.state["skipped"]) for entry in entries]
            self._warn(groups, [entry.position for entry in entries], counts)

    def flagged(self, found: Tensor, groups: Sequence[Mapping[str, Any]], entries: Sequence[Entry]) -> None:
        """Count a step by its skip flag on the device."""
        if torch.compiler.is_compiling() or (found.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        if self._total is None or self._total.device != found.device:
            self._total = torch.zeros_like(found)
        self._total.add_(found)
        self._steps += 1
        self._look(groups)
        if self._steps % WINDOW == 0 and self._under_way is None:
            numbers = torch.stack([self._total, *(entry.state["skipped"].to(found.device) for entry in entries)])
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=found.is_cuda)
            host.copy_(numbers, non_blocking=True)
            event = torch.cuda.Event() if found.is_cuda else None  # type: ignore[no-untyped-call]
            if event is not None:
                event.record()
            self._under_way = (host, event, [entry.position for entry in entries])

    def _look(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Read the counts under way to the host, if they have arrived."""
        if self._under_way is None:
            return
        host, event, positions = self._under_way
        if event is not None and not event.query():
            return
        self._under_way = None
        total, *counts = host.tolist()
        new, self._total_read = total - self._total_read, total
        self._in_a_row = self._in_a_row + WINDOW if new >= WINDOW else 0
        if self._in_a_row == PATIENCE:
            self._warn(groups, positions, counts)

    def _warn(
        self, groups: Sequence[Mapping[str, Any]], positions: Sequence[tuple[int, int]], counts: Sequence[float]
    ) -> None:
        blamed = [parameter_name(groups, place) for place, count in zip(positions, counts, strict=True) if count]
        names = ", ".join(blamed[:5]) + (f" and {len(blamed) - 5} more" if len(blamed) > 5 else "")
        warnings.warn(
            f"{PATIENCE} steps in a row were skipped because gradients were not finite: those of {names}. The model "
            f"does not train until all gradients are finite.",
            RuntimeWarning,
            stacklevel=2,
        )
