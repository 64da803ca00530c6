"""Checks of the arguments of :class:`~spectrim.monitor.monitor.SpectralMonitor`; they raise ValueError."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

__all__ = ["KINDS", "check_arguments", "check_patterns"]

KINDS = ("gradient", "momentum", "update", "weight")


def check_arguments(
    every: int, steps_taken: int, exact_every: int | None, kinds: Sequence[str], rank_ratio: float, alarm: object
) -> None:
    """Check all arguments that need no model."""
    _check("every", every, 1)
    _check("steps_taken", steps_taken, 0)
    if exact_every is not None:
        _check("exact_every", exact_every, 1)
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r}: expected some of {', '.join(map(repr, KINDS))}")
    if not 0 < rank_ratio <= 1:
        raise ValueError(f"rank_ratio={rank_ratio!r}: expected a share above 0, at most 1")
    if alarm is not None and alarm != "default" and not callable(alarm):
        raise ValueError(f"alarm={alarm!r}: expected a callable, None or 'default'")


def _check(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}")


def check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    """Check that every pattern matches the name of a matrix."""
    for pattern in patterns:
        # "*" matches nothing if all parameters are vectors, which is no error.
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"exact pattern {pattern!r} matches no matrix: expected some of {_some(names)}")


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(map(repr, names[:limit])) + (", ..." if len(names) > limit else "")
