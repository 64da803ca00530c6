"""Times of the parts of a step, from the host's clock or, on a GPU, from CUDA events.

Recording an event does not wait; its time is read after the device has passed it.
"""

import time
from typing import Any

import torch

__all__ = ["Clock", "Laps"]


class Clock:
    """Splits time into named shares.

    Args:
        device: does the work. On CUDA a lap ends when the device's current stream reaches it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._now()
        self._laps: list[tuple[str, Any]] = []
        self._moves: list[tuple[str, str, float]] = []

    def lap(self, name: str) -> None:
        """Add the time since the last lap to a share."""
        self._laps.append((name, self._now()))

    def move(self, name: str, to: str, milliseconds: float) -> None:
        """Move at most this much time from one share to another. Does nothing on a GPU, where the host's time is not
        the device's.
        """
        if self._device.type != "cuda":
            self._moves.append((name, to, milliseconds))

    def read(self) -> "Laps":
        """The laps since the last reading."""
        laps = Laps(self._start, self._laps, self._moves)
        if self._laps:
            self._start = self._laps[-1][1]
        self._laps, self._moves = [], []
        return laps

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


class Laps:
    """Shares of time, known once the device has passed the last event."""

    def __init__(self, start: Any, laps: list[tuple[str, Any]], moves: list[tuple[str, str, float]]) -> None:
        self._start, self._laps, self._moves = start, laps, moves

    def milliseconds(self) -> dict[str, float]:
        """The shares by name, rounded to a microsecond; waits for the device if need be."""
        shares: dict[str, float] = {}
        before = self._start
        if self._laps and not isinstance(before, float):
            self._laps[-1][1].synchronize()
        for name, now in self._laps:
            shares[name] = shares.get(name, 0.0) + between(before, now)
            before = now
        for name, to, milliseconds in self._moves:
            moved = min(max(milliseconds, 0.0), shares.get(name, 0.0))
            shares[name] = shares.get(name, 0.0) - moved
            shares[to] = shares.get(to, 0.0) + moved
        return {name: round(share, 3) for name, share in shares.items()}


def between(before: Any, now: Any) -> float:
    """Milliseconds from one reading of the clock to the next."""
    return float(1000 * (now - before) if isinstance(before, float) else before.elapsed_time(now))
