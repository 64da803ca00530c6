"""The clips of parameters in the current step of an optimizer of this library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from spectrim.monitor.subjects import Subject
from spectrim.optim.grouping.options import is_zero
from spectrim.optim.optimizer import SpectralOptimizer
from spectrim.optim.stepping.entries import role_and_layout
from spectrim.optim.wrapping.base_updates import keep_and_limit
from spectrim.optim.wrapping.wrapper import SpectralClipping

__all__ = ["Clip", "clips_of"]

#: Relative tolerance for singular values that the hard clip set to c, up to rounding.
HARD_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Clip:
    """X ← keep · X − limit · √max(1, m/n) · U, for a direction U clipped to threshold 1.

    Attributes:
        keep: the factor of the decay on the weights.
        limit: lr · c.
        form: "soft" or "hard".
    """

    keep: float | Tensor
    limit: float | Tensor
    form: str

    @property
    def share(self) -> float:
        """The share of the limit that a singular value of the update exceeds if and only if the direction's exceeds c.

        The soft clip maps c to c/√2; the hard clip maps all values above c to c.
        """
        return 1 / math.sqrt(2) if self.form == "soft" else 1 - HARD_TOLERANCE


def clips_of(optimizer: Optimizer, subjects: Sequence[Subject]) -> dict[Subject, Clip]:
    """The clips of those subjects whose singular values are clipped.

    Call it before the step, which advances the schedule.
    """
    found: dict[Subject, Clip] = {}
    known: dict[tuple[Any, ...], Clip | None] = {}
    for subject in subjects:
        group, parameter = optimizer.param_groups[subject.position[0]], subject.parameter
        # Parameters that agree in this have one clip, whose tensors are computed once.
        key = (subject.position[0], *role_and_layout(group, parameter), parameter.ndim, parameter.dtype)
        if key not in known:
            known[key] = _clip_of(optimizer, group, parameter)
        if (clip := known[key]) is not None:
            found[subject] = clip
    return found


def _clip_of(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> Clip | None:
    if group.get("clip") is None or is_zero(group["lr"]):
        return None
    role, layout = role_and_layout(group, parameter)
    if layout == "vector":
        return None
    if isinstance(optimizer, SpectralClipping):
        keep, limit = keep_and_limit(group, role, optimizer.decomposition(group, parameter))
        return None if limit is None else Clip(keep, limit, group["clip_form"])
    if isinstance(optimizer, SpectralOptimizer):
        # With a schedule the device counts the steps, since the host does not know of skipped ones.
        rule = optimizer.rule_of(group, parameter, optimizer.steps_on_device(group))
        keep = 1 - rule.lr * rule.weight_decay
        return None if rule.threshold is None else Clip(keep, rule.threshold * rule.lr, group["clip_form"])
    return None
