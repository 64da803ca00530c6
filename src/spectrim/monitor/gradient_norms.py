"""Norms of gradients as the backward pass accumulates them, before the training loop clips them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable

from spectrim.monitor.measurement import squared_norms
from spectrim.monitor.subjects import Subject

__all__ = ["GradientNorms", "is_distributed"]


class GradientNorms:
    """Hooks that keep the squared norms of gradients. They cost a call each, so attach them only for measured steps.

    Args:
        timed: a context that accounts for the time of the work in it.
    """

    def __init__(self, timed: Callable[[], AbstractContextManager[None]]) -> None:
        self.norms: dict[Subject, Tensor] = {}
        """Squared norms (parts) of the gradients of the last micro-batch."""
        self._timed = timed
        self._accumulated: list[Subject] = []
        self._hooks: list[Any] = []

    def attach(self, subjects: Sequence[Subject]) -> None:
        """Register hooks on the subjects' parameters, unless there are hooks already."""
        if not self._hooks:
            for subject in subjects:
                parameter: Any = subject.parameter
                hook = parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, subject))
                self._hooks.append(hook)

    def detach(self) -> None:
        """Remove all hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def _on_gradient(self, subject: Subject, _: Tensor) -> None:
        if subject.team is not None:
            self._take([subject])
            return
        # All norms are computed at once, at the end of the backward pass. Data parallelism sums gradients in a callback
        # of its own there; a callback queued by a callback runs after it.
        if not self._accumulated:
            engine = Variable._execution_engine
            last = self._on_accumulated
            engine.queue_callback((lambda: engine.queue_callback(last)) if is_distributed() else last)
        self._accumulated.append(subject)

    @torch.no_grad()
    def _on_accumulated(self) -> None:
        accumulated, self._accumulated = self._accumulated, []
        self._take(accumulated)

    def _take(self, subjects: Sequence[Subject]) -> None:
        with self._timed():
            self.norms |= squared_norms(subjects)


def is_distributed() -> bool:
    """True if there are several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
