"""The start of a step, shared by the library's optimizers and by the wrapper of other optimizers.

It collects the parameters with their rules and compares the step's options between ranks; the subclass screens the
gradients and steps.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from spectrim.distributed.dtensor import is_dtensor
from spectrim.optim.grouping.options import is_zero
from spectrim.optim.rules.rule import Rule
from spectrim.optim.rules.schedule import remember_rates
from spectrim.optim.screening.agreement import Agreement
from spectrim.optim.screening.skips import SkipWatch
from spectrim.optim.sharded.entry import ShardedEntry, sharded_entry
from spectrim.optim.stepping.entries import Entry, parameter_name, role_and_layout, whole_entry

__all__ = ["ScreenedOptimizer"]

#: Indices of a group and of a parameter in it.
Position = tuple[int, int]


class ScreenedOptimizer(Optimizer):
    """An optimizer that steps all parameters, or none if a gradient is not finite."""

    def _begin(self) -> None:
        """Set the attributes that are not part of a checkpoint."""
        self._agreement = Agreement()
        self._watch = SkipWatch()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, or none if any gradient is not finite.

        Args:
            closure: re-evaluates the model and returns the loss; called once, before the update.

        Raises:
            FloatingPointError: a gradient is not finite and its group has ``on_nonfinite="raise"``. No parameter or
                state is changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        entries = self._collect()
        sharded = [entry for entry in entries if isinstance(entry, ShardedEntry)]
        if sharded:
            self._agreement.check(self.param_groups, sharded)
        if self._take(entries):
            for group in self.param_groups:
                if not is_zero(group["lr"]):
                    group["steps_taken"] += 1
        return loss

    def skipped_steps(self) -> dict[str, int]:
        """Count, for every parameter, the steps that were skipped because its gradient was not finite.

        Reads the device. Parameters that caused no skip are left out.
        """
        counts: dict[str, int] = {}
        for index, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                skipped = self._counts_of(parameter, (index, place)).get("skipped")
                if skipped is not None and (count := int(skipped)):
                    counts[self._name((index, place))] = count
        return counts

    def _collect(self) -> list[Entry]:
        """The parameters with a gradient, and all shards: another rank may have a gradient for them."""
        self._prepare()
        remember_rates(self.param_groups)
        entries: list[Entry] = []
        for index, group in enumerate(self.param_groups):
            rules: dict[tuple[str, bool], Rule] = {}
            for place, parameter in enumerate(group["params"]):
                sharded = is_dtensor(parameter)
                if parameter.grad is None and not (sharded and parameter.requires_grad):
                    continue
                role, layout = role_and_layout(group, parameter)
                kind = (role, layout == "vector")
                if kind not in rules:
                    rules[kind] = self._rule_of_step(group, *kind, index)
                position = (index, place)
                state = self._state_of_step(parameter, position, rules[kind])
                entry_of = sharded_entry if sharded else whole_entry
                entries.append(entry_of(parameter, group, position, self._name(position), state, rules[kind]))
        return entries

    @abstractmethod
    def _prepare(self) -> None:
        """Check and complete groups and state before parameters are collected."""

    @abstractmethod
    def _rule_of_step(self, group: Mapping[str, Any], role: str, vector: bool, index: int) -> Rule:
        """The rule of a group's parameters of one role."""

    @abstractmethod
    def _state_of_step(self, parameter: Tensor, position: Position, rule: Rule) -> dict[str, Tensor]:
        """A parameter's state, with its counts of steps taken and skipped."""

    @abstractmethod
    def _counts_of(self, parameter: Tensor, position: Position) -> Mapping[str, Tensor]:
        """A parameter's counts of steps taken and skipped; empty before its first step."""

    @abstractmethod
    def _take(self, entries: list[Entry]) -> bool:
        """Screen the gradients and step; False if the step was skipped."""

    def _name(self, position: Position) -> str:
        return parameter_name(self.param_groups, position)
