"""Steps within steps: a subclass's ``step`` that calls its parent's has torch's hooks around both."""

from __future__ import annotations

import sys
from types import CodeType
from typing import Any

from torch.optim import Optimizer

__all__ = ["is_inner_step"]

_hooked: Any = Optimizer.profile_hook_step(Optimizer.step)
#: What torch puts around the step of every class of which an optimizer was made.
WRAPPER: CodeType = _hooked.__code__


def is_inner_step(optimizer: Optimizer) -> bool:
    """Whether the hook that asks is of a step that another step of the same optimizer has called.

    Counting hooks would not tell: after a step that raised, its last hook never comes.
    """
    around = 0
    frame = sys._getframe(1)
    while frame is not None and around < 2:
        if frame.f_code is WRAPPER and frame.f_locals.get("self") is optimizer:
            around += 1
        frame = frame.f_back  # type: ignore[assignment]
    return around > 1
