"""Cuts paths down to file names, for pages that are sent to others.

All pages use it; ``results.json`` and ``config.toml`` keep whole paths, for programs.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

__all__ = ["SHORTENED", "shareable", "short"]

SHORTENED = "Places of files are cut down to their names here; put in your own."

WILD = frozenset("*?[")


def short(place: str) -> str:
    """A path's last part, or a glob from its last plain folder on; a relative path stays as it is."""
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(place)
        if path.is_absolute() or place.startswith("~"):
            parts = path.parts
            at = next((index for index, part in enumerate(parts) if WILD & set(part)), len(parts))
            return "/".join(parts[max(1, at - 1) :]) or place
    return place


def shareable(value: Any) -> Any:
    """Shorten every absolute path in a nested value, also those quoted in a sentence."""
    if isinstance(value, str):
        return re.sub(r"(['\"])([/~][^'\"]*)\1", lambda found: f"{found[1]}{short(found[2])}{found[1]}", short(value))
    if isinstance(value, Mapping):
        return {key: shareable(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [shareable(item) for item in value]
    return value
