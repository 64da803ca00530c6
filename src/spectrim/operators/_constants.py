"""A cache of constant tensors on a device. An upload makes the host wait and cannot be captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["cached", "constant"]

_kept: dict[Hashable, Tensor] = {}


def cached(name: Hashable, like: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """The tensor of ``make`` on the device of ``like``, cached under ``name``.

    Tensors made for fake tensors are cached in their mode. Do not call this in code that a compiler traces.
    """
    mode = getattr(like, "fake_mode", None)
    kept: dict[Hashable, Tensor] = _kept if mode is None else vars(mode).setdefault("_spectrim_constants", {})
    key = (name, like.device)
    if key not in kept:
        with torch.inference_mode(False):
            kept[key] = make()
    return kept[key]


def constant(name: Hashable, like: Tensor, make: Callable[[], Sequence[Any]]) -> Tensor:
    """The numbers of ``make`` as a cached float32 tensor, see :func:`cached`."""
    return cached(name, like, lambda: torch.tensor(make(), dtype=torch.float32, device=like.device))
