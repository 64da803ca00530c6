"""Converts values of configs and of numpy to plain Python, so that checkpoints load with ``weights_only=True``."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["as_option", "unwrapped"]


def unwrapped(value: Any) -> Any:
    """Convert containers such as OmegaConf's to dictionaries and lists, and numpy's numbers to Python's.

    Tensors and other objects stay as they are.
    """
    if value is None or isinstance(value, bool | str | bytes | Tensor):
        return value
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping) and (type(value) is dict or not isinstance(value, dict)):
        return {key: unwrapped(item) for key, item in value.items()}
    if type(value) is tuple:
        return tuple(map(unwrapped, value))
    if isinstance(value, Sequence) and (type(value) is list or not isinstance(value, list | tuple)):
        items = list(map(unwrapped, value))
        # torch expects a named parameter as a tuple.
        is_named = len(items) == 2 and isinstance(items[0], str) and isinstance(items[1], Tensor)
        return tuple(items) if is_named else items
    return value


def as_option(value: Any) -> Any:
    """An option's value in plain Python: numbers as ``int`` or ``float``, and lists as tuples."""
    value = unwrapped(value)
    if value is None or isinstance(value, bool | str | Tensor):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Sequence):
        return tuple(map(as_option, value))
    return value
