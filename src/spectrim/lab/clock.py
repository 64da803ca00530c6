"""How long the parts of a step take."""

import time

import torch

__all__ = ["Clock"]


class Clock:
    """Splits the time since it was started into named shares, in milliseconds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._shares: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to a share."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        now = time.perf_counter()
        self._shares[name] = self._shares.get(name, 0.0) + 1000 * (now - self._last)
        self._last = now

    def read(self) -> dict[str, float]:
        """The shares since the last reading, rounded to a microsecond."""
        shares, self._shares = self._shares, {}
        return {name: round(share, 3) for name, share in shares.items()}

    def move(self, name: str, to: str, milliseconds: float) -> None:
        """Count so much of one share, or all of it if it is less, as another."""
        moved = min(max(milliseconds, 0.0), self._shares.get(name, 0.0))
        self._shares[name] = self._shares.get(name, 0.0) - moved
        self._shares[to] = self._shares.get(to, 0.0) + moved
