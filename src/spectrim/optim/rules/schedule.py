"""Clip thresholds over time, computed from a param group's options and its number of steps.

The options are plain numbers and strings, so they survive a checkpoint, and the threshold follows any scheduler of the
learning rate. If the learning rate is a tensor on a device, the threshold is one too, and the device is not read.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spectrim.operators._stack import reading_is_free
from spectrim.optim.grouping.options import ClipDecay, is_zero

__all__ = [
    "AUTO_CLIP",
    "clip_threshold",
    "number_if_free",
    "peak_lr_of",
    "pre_clip_threshold",
    "remember_rates",
    "varies_with_steps",
]


#: c times the peak learning rate for ``clip="auto"``: an update changes a weight matrix by at most this times
#: √max(1, m/n) in spectral norm, times the group's ``lr_factor``. Nearly all published runs of arXiv 2603.14315 use it.
AUTO_CLIP = 0.01

#: Lower bound by which a learning rate on a device is replaced in divisions, since it may be zero.
LEAST_LR = 1e-30

#: The least factor on a threshold that decays to zero, and on the peak rate in a warm-up.
LEAST = 1e-6


def peak_lr_of(group: Mapping[str, Any]) -> float:
    """The peak learning rate that a group's thresholds refer to.

    It is the group's ``peak_lr`` if given. Otherwise it is ``max_lr`` or ``initial_lr``, which torch's schedulers set,
    or the group's first learning rate; or the largest rate of any step so far, if that is larger.
    """
    if group.get("peak_lr") is not None:
        return float(group["peak_lr"])
    lr = number_if_free(group["lr"])
    return max(_known_peak(group), float(group["largest_lr"]), 0.0 if isinstance(lr, Tensor) else lr)


def remember_rates(groups: Sequence[dict[str, Any]]) -> None:
    """Update every group's ``largest_lr``, and warn when it first exceeds the peak. Rates on a device are ignored."""
    beyond: list[str] = []
    for index, group in enumerate(groups):
        lr = number_if_free(group["lr"])
        if isinstance(lr, Tensor):
            continue
        peak, before = _known_peak(group), group["largest_lr"]
        group["largest_lr"] = max(lr, before)
        depends = group["clip"] == "auto" or (group["clip"] is not None and group["warmup_steps"] not in ("auto", 0))
        # The tolerance allows for rounding in the schedule. Warn only at the first step beyond the peak.
        if depends and lr > peak * (1 + 1e-6) and before <= peak * (1 + 1e-6):
            beyond.append(f"{lr:g} in group {index}, beyond {peak:g}")
    if beyond:
        warnings.warn(
            f"the learning rate rose above the peak that clipping thresholds refer to ({'; '.join(beyond)}). With a "
            f"given peak_lr, updates now exceed their bound; otherwise thresholds follow the largest rate so far. "
            f"Set peak_lr= to the largest rate of the schedule.",
            stacklevel=4,
        )


def number_if_free(lr: float | Tensor) -> float | Tensor:
    """A learning rate as a number, unless it is a tensor whose reading would block or which a compiler traces."""
    return lr if isinstance(lr, Tensor) and not reading_is_free(lr) else float(lr)


def _known_peak(group: Mapping[str, Any]) -> float:
    """The peak learning rate as far as the group states it."""
    known = ("peak_lr", "max_lr", "initial_lr", "first_lr")
    return float(next(group[key] for key in known if group.get(key) is not None))


def varies_with_steps(group: Mapping[str, Any]) -> bool:
    """True if a threshold of a group depends on how many steps it has taken."""
    counted = group["warmup_steps"] not in ("auto", 0)
    clip = group["clip"] is not None and (counted or group["clip_decay"] != "constant")
    return clip or (group.get("pre_clip") is not None and (counted or group["pre_clip_decay"] != "constant"))


def clip_threshold(group: Mapping[str, Any], steps: int | Tensor | None = None) -> float | Tensor | None:
    """The threshold c for the group's next step, or None if nothing is clipped.

    During warm-up, c times the learning rate is constant. After it c is constant, and may decay over the last part of
    training (arXiv 2603.14315).

    Args:
        group: a param group. Its learning rate is a number, or a scalar tensor, which is not read.
        steps: the number of steps before this one, or a scalar tensor on the device; by default the group's count.

    Returns:
        A number, or a scalar tensor if the threshold depends on a tensor.

    Raises:
        ValueError: the group has ``clip="auto"``, started at learning rate 0 and has no ``peak_lr``.
    """
    clip = group["clip"]
    lr: float | Tensor = group["lr"]
    if clip is None or is_zero(lr):
        return None
    peak = peak_lr_of(group)
    if clip == "auto" and peak == 0:
        raise ValueError(
            f"peak_lr={peak} with clip='auto' at lr={lr}: the group began at 0, so give it a peak_lr above 0"
        )
    # A group with an lr_factor may move further by that factor.
    threshold = AUTO_CLIP * group["lr_factor"] / peak if clip == "auto" else float(clip)
    count = group["steps_taken"] if steps is None else steps
    decay, fraction, final = group["clip_decay"], group["clip_decay_fraction"], group["clip_final"]
    later = threshold * decay_factor(decay, count, total_steps=group["total_steps"], fraction=fraction, final=final)
    return _warmed_up(group, threshold, later, count)


def pre_clip_threshold(group: Mapping[str, Any], steps: int | Tensor | None = None) -> float | Tensor | None:
    """The threshold on the gradient's singular values in the group's next step, or None.

    Without ``pre_clip_decay`` it times the learning rate is constant during warm-up. With it, the curve over the whole
    of training alone decides, as in the authors' code. Arguments and result are those of :func:`clip_threshold`.
    """
    if group.get("pre_clip") is None:
        return None
    threshold = float(group["pre_clip"])
    count = group["steps_taken"] if steps is None else steps
    if group["pre_clip_decay"] == "constant":
        return _warmed_up(group, threshold, threshold, count)
    decay, final = group["pre_clip_decay"], group["pre_clip_final"]
    return threshold * decay_factor(decay, count, total_steps=group["total_steps"], fraction=1.0, final=final)


def _warmed_up(
    group: Mapping[str, Any], threshold: float, later: float | Tensor, count: int | Tensor
) -> float | Tensor:
    """The threshold during warm-up, inversely proportional to the learning rate; after it, ``later``."""
    lr, warmup = number_if_free(group["lr"]), group["warmup_steps"]
    warming: bool | Tensor
    if warmup != "auto":
        warming = count < warmup
    elif isinstance(lr, Tensor):
        warming = False
    else:
        # The tolerance allows for rounding in the schedule.
        warming = max(lr, group["largest_lr"]) < _scheduled_peak(group) * (1 - 1e-6)
    if warming is False:
        return later
    peak = _scheduled_peak(group) if warmup == "auto" else peak_lr_of(group)
    if peak == 0:
        return later
    # No higher than a million times the threshold, which clips nothing either.
    early = threshold * peak / (lr.clamp_min(LEAST_LR) if isinstance(lr, Tensor) else max(lr, peak * LEAST, LEAST_LR))
    return torch.where(warming, early, later) if isinstance(warming, Tensor) else early


def _scheduled_peak(group: Mapping[str, Any]) -> float:
    """The rate at which the warm-up of a group ends: its scheduler's, or ``peak_lr`` if that is smaller; else 0."""
    rates = {key: float(group[key]) for key in ("max_lr", "initial_lr", "peak_lr") if group.get(key) is not None}
    if "initial_lr" in rates:
        # timm's schedulers multiply the rates of a group by its lr_scale.
        rates["initial_lr"] *= group.get("lr_scale", 1.0)
    if "max_lr" in rates:
        rates.pop("initial_lr", None)
    return min(rates.values(), default=0.0)


def decay_factor(
    decay: ClipDecay, steps: int | Tensor, *, total_steps: int | None, fraction: float, final: float
) -> float | Tensor:
    """The factor on c at this step: 1 until the last ``fraction`` of training, then changing to ``final`` at the end.

    Never below :data:`LEAST`, since operators divide by c.
    """
    if decay == "constant" or total_steps is None:
        return 1.0
    length = max(total_steps * fraction, 1.0)
    progress = (steps - (total_steps - length)) / length
    x: Any
    functions: Any
    if isinstance(progress, Tensor):
        x, functions = progress.clamp(0.0, 1.0), torch
    else:
        x, functions = min(max(progress, 0.0), 1.0), math
    share = {
        "linear": lambda: x,
        "cosine": lambda: (1 - functions.cos(math.pi * x)) / 2,
        "sqrt": lambda: functions.sqrt(x),
        "square": lambda: x**2,
    }
    factor: float | Tensor = final**x if decay == "exponential" else 1 - (1 - final) * share[decay]()
    return factor.clamp_min(LEAST) if isinstance(factor, Tensor) else max(factor, LEAST)
