"""Copies numbers from a device to the host without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Fetch"]


class Fetch:
    """Copies flat tensors to the host in float64, with one copy from each device.

    A copy from a CUDA device goes to pinned memory and does not wait; other copies are complete on return.

    Args:
        tensors: of one dimension, on any devices. They may be overwritten afterwards.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._count = len(tensors)
        self._copies: list[tuple[list[int], list[int], Tensor, Any]] = []
        for device in dict.fromkeys(tensor.device for tensor in tensors):
            indices = [index for index, tensor in enumerate(tensors) if tensor.device == device]
            here = [tensors[index].double() for index in indices]
            host, event = begin_copy(torch.cat(here))
            self._copies.append((indices, [len(tensor) for tensor in here], host, event))

    def ready(self) -> bool:
        """True if :meth:`read` would return without waiting."""
        return all(event is None or event.query() for *_, event in self._copies)

    def read(self) -> list[Tensor]:
        """The tensors on the host; waits for the copies."""
        found: dict[int, Tensor] = {}
        for indices, lengths, host, event in self._copies:
            if event is not None:
                event.synchronize()
            found.update(zip(indices, torch.split(host, lengths), strict=True))
        return [found[index] for index in range(self._count)]


def begin_copy(tensor: Tensor) -> tuple[Tensor, Any]:
    """A copy on the host, and the event after which it is complete, or None if it is complete already."""
    if tensor.device.type != "cuda":
        return tensor.cpu(), None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(tensor.device))
    return host, event
