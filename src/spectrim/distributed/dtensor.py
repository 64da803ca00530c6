"""Recognises DTensors without importing them, which takes half a second and is not needed if there are none."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import Parameter
from typing_extensions import TypeIs

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["is_dtensor"]


def is_dtensor(value: object) -> TypeIs[DTensor]:
    """True for a DTensor, whether it is a parameter or not."""
    if type(value) is Tensor or type(value) is Parameter:
        return False
    known = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return known is not None and isinstance(value, known)
