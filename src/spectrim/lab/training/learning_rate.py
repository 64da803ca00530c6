"""The learning rate as a pure function of the step, so that there is no scheduler state to save.

Every shape begins with a linear warm-up that ends at the peak:

    cosine      half a cosine from the peak to the final fraction at the last step
    wsd         warm-up, stable at the peak, decay to the final fraction over the last steps
    constant    stays at the peak
"""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spectrim.lab.config import TrainConfig

__all__ = ["learning_rate_factor"]


def learning_rate_factor(step: int, config: "TrainConfig") -> float:
    """Factor on the peak learning rate in the update with index ``step`` (from 0); in (0, 1] before the last.

    It is 1 / warmup_steps in the first update, and ``final_fraction`` in the last unless the shape is "constant".
    """
    schedule, warmup = config.schedule, config.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if schedule.shape == "constant":
        return 1.0
    if schedule.shape == "cosine":
        progress = (step + 1 - warmup) / max(1, config.steps - warmup)
        fall = (1 + math.cos(math.pi * progress)) / 2
    else:
        progress = max(0.0, 1 - (config.steps - step - 1) / config.decay_steps)
        fall = 1 - progress if schedule.decay == "linear" else 1 - math.sqrt(progress)
    return schedule.final_fraction + (1 - schedule.final_fraction) * fall
