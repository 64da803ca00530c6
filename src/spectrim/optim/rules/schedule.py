"""Clip thresholds over time, from the values of a param group and the number of steps that it has taken.

A group holds ``clip`` (c, or "auto"), ``peak_lr``, ``warmup_steps``, ``total_steps`` and the three ``clip_`` options
below, all plain numbers and strings, so a threshold survives a checkpoint and follows whatever scheduler drives the
learning rate. Where the learning rate is a tensor, so is the threshold, and nothing is read.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spectrim.operators._stack import reading_is_free
from spectrim.optim.grouping.options import ClipDecay

__all__ = [
    "AUTO_CLIP",
    "clip_threshold",
    "peak_lr_of",
    "remember_rates",
    "varies_with_steps",
]


#: c times the peak learning rate, before a group's factor, for ``clip="auto"``: no update moves a weight matrix by
#: more than this times √max(1, m/n) in spectral norm. The value in nearly all published runs of arXiv 2603.14315.
AUTO_CLIP = 0.01

#: A learning rate on a device may be zero without anybody knowing; the threshold must stay finite then.
LEAST_LR = 1e-30


def peak_lr_of(group: Mapping[str, Any]) -> float:
    """The learning rate that a group's thresholds refer to.

    The one that the group states; else the ``max_lr`` or ``initial_lr`` that torch's schedulers leave in the group, or
    what the group was made with, or the largest that it has stepped with or is about to, where that is larger.
    """
    if group.get("peak_lr") is not None:
        return float(group["peak_lr"])
    lr = group["lr"]
    coming = 0.0 if isinstance(lr, Tensor) and not reading_is_free(lr) else float(lr)
    return max(_known_peak(group), float(group["largest_lr"]), coming)


def remember_rates(groups: Sequence[dict[str, Any]]) -> None:
    """Keep the largest learning rate that every group has stepped with, and warn where it passes the peak for the first
    time. What only a device knows is left out."""
    beyond: list[str] = []
    for index, group in enumerate(groups):
        lr = group["lr"]
        if isinstance(lr, Tensor) and not reading_is_free(lr):
            continue
        peak, before = _known_peak(group), group["largest_lr"]
        group["largest_lr"] = max(float(lr), before)
        depends = group["clip"] == "auto" or (group["clip"] is not None and group["warmup_steps"] > 0)
        # Rounding of a schedule is no rise; and what has been told is not told again.
        if depends and lr > peak * (1 + 1e-6) and before <= peak * (1 + 1e-6):
            beyond.append(f"{float(lr):g} in group {index}, beyond {peak:g}")
    if beyond:
        warnings.warn(
            f"the learning rate rose above the peak that clipping thresholds refer to ({'; '.join(beyond)}). Where "
            f"peak_lr was given, updates now exceed their bound; elsewhere thresholds follow the largest rate so far. "
            f"Give peak_lr= the largest rate that the schedule reaches.",
            stacklevel=4,
        )


def _known_peak(group: Mapping[str, Any]) -> float:
    """What the group's learning rate may be expected to reach, before any step."""
    known = ("peak_lr", "max_lr", "initial_lr", "first_lr")
    return float(next(group[key] for key in known if group.get(key) is not None))


def varies_with_steps(group: Mapping[str, Any]) -> bool:
    """True if a group's threshold depends on how many steps it has taken."""
    return group["clip"] is not None and (group["warmup_steps"] > 0 or group["clip_decay"] != "constant")


def clip_threshold(group: Mapping[str, Any], steps: int | Tensor | None = None) -> float | Tensor | None:
    """The threshold c at the group's present step, or None where nothing is clipped.

    While the learning rate warms up, c times the learning rate is constant; then c is; then c may decay over the
    last part of training (arXiv 2603.14315).

    Args:
        group: a param group. Its learning rate is a number, or a scalar tensor, which is not read.
        steps: how many the group has taken before this one, as a number or a scalar tensor on the device; the group's
            own count by default.

    Returns:
        A number, or a scalar tensor where the learning rate or ``steps`` is one and matters.

    Raises:
        ValueError: ``clip="auto"`` in a group that began at learning rate 0 and was given no ``peak_lr``.
    """
    clip = group["clip"]
    lr: float | Tensor = group["lr"]
    if clip is None or (isinstance(lr, float | int) and lr == 0):
        return None
    peak = peak_lr_of(group)
    if clip == "auto" and peak == 0:
        raise ValueError(
            f"peak_lr={peak} with clip='auto' at lr={lr}: the group began at 0, so give it a peak_lr above 0"
        )
    # A group whose learning rate carries a factor moves by that factor further, clipped or not.
    threshold = AUTO_CLIP * group["lr_factor"] / peak if clip == "auto" else float(clip)
    if not varies_with_steps(group):
        return threshold
    count = group["steps_taken"] if steps is None else steps
    later = threshold * decay_factor(
        group["clip_decay"],
        count,
        total_steps=group["total_steps"],
        fraction=group["clip_decay_fraction"],
        final=group["clip_final"],
    )
    warmup = group["warmup_steps"]
    if isinstance(count, Tensor):
        early = threshold * peak / (lr.clamp_min(LEAST_LR) if isinstance(lr, Tensor) else lr)
        return torch.where(count < warmup, early, later)
    if count < warmup:
        return threshold * peak / (lr.clamp_min(LEAST_LR) if isinstance(lr, Tensor) else lr)
    return later


def decay_factor(
    decay: ClipDecay, steps: int | Tensor, *, total_steps: int | None, fraction: float, final: float
) -> float | Tensor:
    """The share of c that is left at this step: 1 until the last ``fraction`` of training, ``final`` at its end."""
    if decay == "constant" or total_steps is None:
        return 1.0
    length = max(total_steps * fraction, 1.0)
    start = total_steps - length
    if isinstance(steps, Tensor):
        x = ((steps - start) / length).clamp(0.0, 1.0)
        shares = {
            "linear": lambda: x,
            "cosine": lambda: (1 - torch.cos(math.pi * x)) / 2,
            "sqrt": lambda: x.sqrt(),
            "square": lambda: x.square(),
        }
        return torch.pow(final, x) if decay == "exponential" else 1 - (1 - final) * shares[decay]()
    progress = min(max((steps - start) / length, 0.0), 1.0)
    if decay == "exponential":
        return float(final**progress)
    numbers = {
        "linear": progress,
        "cosine": (1 - math.cos(math.pi * progress)) / 2,
        "sqrt": math.sqrt(progress),
        "square": progress**2,
    }
    return 1 - (1 - final) * numbers[decay]
