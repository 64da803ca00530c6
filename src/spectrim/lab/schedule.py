"""The learning rate as a pure function of the step, so that there is no scheduler state to save."""

import math

__all__ = ["evaluation_steps", "learning_rate_factor"]


def learning_rate_factor(step: int, *, steps: int, warmup_steps: int, final_fraction: float) -> float:
    """Factor on the peak learning rate in the update with index ``step`` (from 0): warm-up, then cosine.

    The warm-up ends at the peak; the last update has ``final_fraction`` of it.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step + 1 - warmup_steps) / max(1, steps - warmup_steps)
    return final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * progress)) / 2


def evaluation_steps(steps: int, times: int) -> frozenset[int]:
    """After which steps (from 1) to evaluate: evenly spaced, the last one at the end."""
    return frozenset(math.ceil(index * steps / times) for index in range(1, times + 1))
