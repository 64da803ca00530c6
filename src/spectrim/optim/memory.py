"""How much memory a step may take on a device, beside weights, gradients and state: a setting of the process."""

from __future__ import annotations

__all__ = ["set_step_memory", "stack_bytes", "workspace_bytes"]

DEFAULT = 512
#: Of the whole, what the matrices of a bucket may take, in float32; the rest is for what operators need besides.
SHARE_OF_STACKS = 3 / 8

_bytes = DEFAULT * 2**20


def set_step_memory(megabytes: int = DEFAULT) -> None:
    """Let a step on a device take so much memory beside weights, gradients and state, or what one matrix needs.

    Matrices go through an operator in buckets that fit. Fewer buckets have fewer launches, which is what a step of a
    small model waits for: with 1,024 the matrices of GPT-2 small are clipped in one. Call it before the first step;
    what a CUDA graph has captured stays as it is. On the host buckets are small whatever is set.

    Raises:
        ValueError: less than one megabyte.
    """
    global _bytes
    if not isinstance(megabytes, int) or megabytes < 1:
        raise ValueError(f"megabytes={megabytes!r}: expected a positive integer")
    _bytes = megabytes * 2**20


def stack_bytes() -> int:
    """What the matrices of one bucket may take."""
    return int(_bytes * SHARE_OF_STACKS)


def workspace_bytes() -> int:
    """What an operator may need besides."""
    return _bytes - stack_bytes()
