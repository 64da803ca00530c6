"""Which optimizer to hook, and when its step hooks must do nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["innermost", "is_inner_step", "untraced"]

_hooked: Any = Optimizer.profile_hook_step(Optimizer.step)
#: The function in which torch wraps the step of every optimizer class.
WRAPPER: CodeType = _hooked.__code__


def innermost(optimizer: Any) -> Any:
    """The optimizer inside of wrappers such as accelerate's, whose own hooks never run."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def is_inner_step(optimizer: Optimizer) -> bool:
    """True if the calling hook belongs to a step that another step of the same optimizer called.

    A subclass's ``step`` may call its parent's, and torch runs the hooks around both. A counter would be wrong after an
    exception, when the last hook never runs.
    """
    around = 0
    frame = sys._getframe(1)
    while frame is not None and around < 2:
        if frame.f_code is WRAPPER and frame.f_locals.get("self") is optimizer:
            around += 1
        frame = frame.f_back  # type: ignore[assignment]
    return around > 1


def untraced(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that is not compiled with its step and does nothing in a step that a CUDA graph captures.

    The compiler is looked up when the hook runs, since importing it takes long.
    """
    cuda: Any = torch.cuda

    def run(*arguments: Any) -> None:
        if torch.compiler.is_compiling():
            compiler: Any = torch.compiler
            compiler.disable(hook)(*arguments)
        elif not (cuda.is_initialized() and cuda.is_current_stream_capturing()):
            hook(*arguments)

    return run
