"""Tables of numbers on a device, uploaded once and kept: an upload makes the host wait, and cannot be captured."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["constant"]

_kept: dict[Hashable, Tensor] = {}


def constant(name: Hashable, like: Tensor, make: Callable[[], Sequence[Any]]) -> Tensor:
    """The float32 table that ``make`` lists, on the device of ``like``: made at the first call, the same tensor after.

    A table made for fake tensors belongs to their mode and is kept there. Not for code that a compiler traces.
    """
    mode = getattr(like, "fake_mode", None)
    kept: dict[Hashable, Tensor] = _kept if mode is None else vars(mode).setdefault("_spectrim_constants", {})
    key = (name, like.device)
    if key not in kept:
        with torch.inference_mode(False):
            kept[key] = torch.tensor(make(), dtype=torch.float32, device=like.device)
    return kept[key]
