"""How an optimizer of this library clips a parameter in its present step, as the monitor needs it after the step."""

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

#: A singular value that the hard clip set to c is found within rounding of it.
HARD_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Clip:
    """X ← keep · X − limit · (the clipped direction, its threshold scaled to one).

    Attributes:
        keep: what the step leaves of the weights before the direction is subtracted.
        limit: the largest singular value that the clip lets the step have: lr · c · √max(1, m/n).
        form: "soft" or "hard".
    """

    keep: float | Tensor
    limit: float | Tensor
    form: str

    @property
    def share(self) -> float:
        """Of the limit, what the step's singular values exceed if and only if the direction's exceed c.

        The soft clip takes c to c/√2, and is increasing; the hard one takes all above c to c.
        """
        return 1 / math.sqrt(2) if self.form == "soft" else 1 - HARD_TOLERANCE


def clip_of(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor, shape: tuple[int, ...]) -> Clip | None:
    """The clip of one logical matrix of this shape, or None where its singular values are not clipped.

    To be asked before the step, which moves the schedule on.
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
