"""The clip of a parameter in the current step of an optimizer of this library."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from spectrim.optim.grouping.options import is_zero
from spectrim.optim.optimizer import SpectralOptimizer
from spectrim.optim.stepping.entries import role_and_layout
from spectrim.optim.wrapping.base_updates import keep_and_limit
from spectrim.optim.wrapping.wrapper import SpectralClipping

__all__ = ["Clip", "clip_of"]

#: Relative tolerance for singular values that the hard clip set to c, up to rounding.
HARD_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Clip:
    """X ← keep · X − limit · U, for a direction U clipped to threshold 1.

    Attributes:
        keep: the factor of the decay on the weights.
        limit: the largest singular value of a clipped update: lr · c · √max(1, m/n).
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


def clip_of(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor, shape: tuple[int, ...]) -> Clip | None:
    """The clip of one logical matrix of this shape, or None if its singular values are not clipped.

    Call it before the step, which advances the schedule.
    """
    if group.get("clip") is None or is_zero(group["lr"]):
        return None
    role, layout = role_and_layout(group, parameter)
    if layout == "vector":
        return None
    scale = math.sqrt(max(1.0, shape[-2] / shape[-1]))
    if isinstance(optimizer, SpectralClipping):
        keep, limit = keep_and_limit(group, role, optimizer.decomposition(group, parameter))
        return None if limit is None else Clip(keep, limit * scale, group["clip_form"])
    if isinstance(optimizer, SpectralOptimizer):
        rule = optimizer.rule_of(group, parameter)
        keep = 1 - rule.lr * rule.weight_decay
        return None if rule.threshold is None else Clip(keep, rule.threshold * rule.lr * scale, group["clip_form"])
    return None
