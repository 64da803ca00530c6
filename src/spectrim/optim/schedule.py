"""Clip thresholds over time, from the values of a param group alone.

A group holds ``clip`` (c, or "auto"), ``peak_lr``, ``warmup_steps``, ``total_steps`` and the three ``clip_`` options
below, all plain numbers and strings, so a threshold survives a checkpoint and follows whatever scheduler drives the
learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import Tensor

__all__ = ["AUTO_CLIP", "CLIP_DECAYS", "ClipDecay", "clip_threshold"]

ClipDecay = Literal["constant", "linear", "cosine", "sqrt", "square", "exponential"]
CLIP_DECAYS: tuple[str, ...] = get_args(ClipDecay)

#: c times the peak learning rate, before a group's factor, for ``clip="auto"``: no update moves a weight matrix by
#: more than this times √max(1, m/n) in spectral norm. The value in nearly all published runs of arXiv 2603.14315.
AUTO_CLIP = 0.01


def clip_threshold(group: Mapping[str, Any]) -> float | Tensor | None:
    """The threshold c at the group's present step, or None where nothing is clipped.

    While the learning rate warms up, c times the learning rate is constant; then c is; then c may decay over the
    last part of training (arXiv 2603.14315). A tensor only where the group's learning rate is one.

    Raises:
        ValueError: ``clip="auto"`` in a group that began at learning rate 0 and was given no ``peak_lr``.
    """
    clip = group["clip"]
    lr: float | Tensor = group["lr"]
    if clip is None or (isinstance(lr, float | int) and lr == 0):
        return None
    peak: float = group["peak_lr"]
    if clip == "auto" and peak == 0:
        raise ValueError(
            f"peak_lr={peak} with clip='auto' at lr={lr}: the group began at 0, so give it a peak_lr above 0"
        )
    # A group whose learning rate carries a factor moves by that factor further, clipped or not.
    threshold: float | Tensor = AUTO_CLIP * group["lr_scale"] / peak if clip == "auto" else float(clip)
    step = group["steps_taken"]
    if step < group["warmup_steps"]:
        return threshold * peak / lr
    return threshold * decay_factor(
        group["clip_decay"],
        step,
        total_steps=group["total_steps"],
        fraction=group["clip_decay_fraction"],
        final=group["clip_final"],
    )


def decay_factor(decay: ClipDecay, step: int, *, total_steps: int | None, fraction: float, final: float) -> float:
    """The share of c that is left at this step: 1 until the last ``fraction`` of training, ``final`` at its end."""
    if decay == "constant" or total_steps is None:
        return 1.0
    length = max(total_steps * fraction, 1.0)
    progress = min(max((step - (total_steps - length)) / length, 0.0), 1.0)
    if decay == "exponential":
        return float(final**progress)
    shapes = {
        "linear": progress,
        "cosine": (1 - math.cos(math.pi * progress)) / 2,
        "sqrt": math.sqrt(progress),
        "square": progress**2,
    }
    return 1 - (1 - final) * shapes[decay]
