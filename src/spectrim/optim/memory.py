"""The process-wide limit on the temporary memory of a step on a device."""

from __future__ import annotations

__all__ = ["set_step_memory", "stack_bytes", "workspace_bytes"]

DEFAULT = 512
#: The share of the limit for the float32 matrices of a bucket; the rest is workspace of the operators.
SHARE_OF_STACKS = 3 / 8

_bytes = DEFAULT * 2**20


def set_step_memory(megabytes: int = DEFAULT) -> None:
    """Limit the temporary memory of a step on a device: memory in addition to weights, gradients and state.

    Matrices go through operators in buckets that fit the limit; a single matrix may exceed it. A larger limit means
    fewer buckets and fewer launches, which makes steps of small models faster: 1,024 clips all matrices of GPT-2 small
    in one bucket. Call it before the first step; captured CUDA graphs do not change. The host ignores the limit.

    Raises:
        ValueError: not a positive integer.
    """
    global _bytes
    if not isinstance(megabytes, int) or megabytes < 1:
        raise ValueError(f"megabytes={megabytes!r}: expected a positive integer")
    _bytes = megabytes * 2**20


def stack_bytes() -> int:
    """The most bytes for the matrices of one bucket."""
    return int(_bytes * SHARE_OF_STACKS)


def workspace_bytes() -> int:
    """The most bytes for an operator's workspace."""
    return _bytes - stack_bytes()
