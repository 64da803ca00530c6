"""The base class of all optimizers here. Every named optimizer is this class with another :class:`.Recipe`.

``step`` *collects* the parameters that have a gradient, *screens* all gradients for NaN and infinity, then steps whole
parameters (:mod:`~spectrim.optim.stepping.step`) and sharded ones (:mod:`~spectrim.optim.sharded.shard_step`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from spectrim.operators._stack import reading_is_free
from spectrim.optim.gradients.in_place import clip_gradients
from spectrim.optim.gradients.matrices import Clipping
from spectrim.optim.grouping.flat_shards import check_group, count_matrices, warn_of_long_vectors
from spectrim.optim.grouping.missing_roles import warn_of_missing_roles
from spectrim.optim.grouping.options import complete_options, finish_group
from spectrim.optim.grouping.plain import unwrapped
from spectrim.optim.rules.rule import Applied, Recipe, Rule, rule_of
from spectrim.optim.rules.schedule import varies_with_steps
from spectrim.optim.screened import Position, ScreenedOptimizer
from spectrim.optim.screening.nonfinite import screen
from spectrim.optim.sharded.entry import ShardedEntry
from spectrim.optim.sharded.shard_step import step_shards
from spectrim.optim.state.loading import load_state
from spectrim.optim.state.parameter_state import check_parameter, drop_orphans, fit_state, new_state
from spectrim.optim.stepping.entries import Entry, role_and_layout
from spectrim.optim.stepping.step import step_entries

__all__ = ["SpectralOptimizer"]


class SpectralOptimizer(ScreenedOptimizer):
    """The base of every spectrim optimizer. A subclass names a recipe and passes its options to ``__init__``.

    The options become the defaults of every param group. Groups made by :func:`spectrim.param_groups` carry the role of
    their parameters; in a plain list, 2-D and 3-D parameters are matrices and all others vectors.

    Args:
        params: as for every torch optimizer. Error messages use the names of named parameters.
        options: the subclass's own options, including "lr" and "weight_decay".
        extra: the caller's keywords: those of :class:`.SpectralOptions`, and ``process_group``, ranks that must skip
            a step together although their parameters share no mesh, such as pipeline stages.

    Raises:
        TypeError: an unknown keyword.
        ValueError: a value is not allowed; the message names it, the group and the choices.
    """

    recipe: ClassVar[Recipe]

    #: Tells a GradScaler to pass its scale and overflow flag to ``step`` instead of reading the flag itself.
    _step_supports_amp_scaling = True

    def __init__(self, params: ParamsT, options: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        extra = dict(extra)
        self._process_group: dist.ProcessGroup | None = extra.pop("process_group", None)
        self._begin()
        defaults = complete_options(options, extra)
        # torch's cyclic schedulers cycle the first of "betas" if an optimizer's defaults have any, else "momentum".
        # Recipes with a momentum therefore keep "betas" out of the defaults.
        self._unlisted = {"betas": defaults.pop("betas")} if "momentum" in defaults else {}
        # A config hands over its own kinds of lists and groups; a generator stays one.
        super().__init__(unwrapped(params), defaults)
        if self.recipe.operator is not None:
            warn_of_missing_roles(type(self).__name__, self.param_groups)

    # -- Groups and state ----------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and complete its options from the defaults. A refused group leaves the optimizer unchanged."""
        index = len(self.param_groups)
        group = dict(param_group)
        finish_group(group, {**self.defaults, **self._unlisted}, index)
        group["recipe"] = self.recipe.name
        super().add_param_group(group)
        group = self.param_groups[index]
        try:
            for position, parameter in enumerate(group["params"]):
                check_parameter(parameter, self._name((index, position)))
        except ValueError:
            self.param_groups.pop()
            raise
        group["matrices"] = count_matrices(group["params"])

    def rule(self, group: Mapping[str, Any], parameter: Tensor) -> str:
        """A short description of the step of a parameter of this group, for ``describe``."""
        return self.rule_of(group, parameter).label

    def applied(self, group: Mapping[str, Any], parameter: Tensor) -> Applied:
        """Learning rate, decay and clip threshold of a parameter's next step, for ``describe``. May read the device."""
        return self.rule_of(group, parameter, self.steps_on_device(group)).applied

    def rule_of(self, group: Mapping[str, Any], parameter: Tensor, steps: Tensor | None = None) -> Rule:
        """The rule of the next step of a parameter; its threshold is exact only with :meth:`steps_on_device`."""
        role, layout = role_and_layout(group, parameter)
        return rule_of(group, self.recipe, role, vector=layout == "vector", steps=steps)

    def state_dict(self) -> dict[str, Any]:
        """Groups and state in torch's format, without state of parameters that are no longer in a group."""
        drop_orphans(self.state, self.param_groups)
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            # Loops write numpy's numbers into groups.
            group |= {key: unwrapped(value) for key, value in group.items()}
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, or of the torch optimizer with the same moments.

        Tensors are converted to the parameter's device and the optimizer's state dtype. Options that the state dict
        lacks keep their values; parameters that it lacks start with new state.

        Raises:
            ValueError: the state belongs to another recipe, or a tensor has the wrong shape. Nothing is changed then.
        """
        drop_orphans(self.state, self.param_groups)
        load_state(self, state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_process_group", None)
        self.__dict__.setdefault("_unlisted", {})
        self._begin()

    def __getstate__(self) -> dict[str, Any]:
        # Process groups cannot be pickled.
        return {**super().__getstate__(), "_process_group": None, "_unlisted": self._unlisted}

    def state_of(self, parameter: Tensor, group: Mapping[str, Any], name: str) -> dict[str, Tensor]:
        """New state for a parameter of a group; the optimizer does not store it."""
        _, layout = role_and_layout(group, parameter)
        return new_state(parameter, self.rule_of(group, parameter), layout, group["split"], name)

    # -- Before the step ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def pre_clip_(self) -> None:
        """Pre-clip gradients now, not in the next step, so that their global norm can be bounded in between. ::

            loss.backward()
            optimizer.pre_clip_()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        The gradients of groups without ``pre_clip`` stay. With a GradScaler, call its ``unscale_`` first. Call it on
        every rank if parameters are sharded.
        """
        # It is still set if the loop has dropped the gradients of an earlier call.
        self._pre_clipped = False
        for index, group in enumerate(self.param_groups):
            if group["pre_clip"] is not None and group.get("role") != "vector":
                rule = self._rule_of_step(group, group.get("role") or "matrix", False, index)
                if rule.pre_clip is not None:
                    clip_gradients([group], Clipping("soft", rule.pre_clip, measure=False))
        self._pre_clipped = True

    # -- The step ------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        super()._begin()
        self._pre_clipped = False

    def _take(self, entries: list[Entry]) -> bool:
        self._pre_clipped = False
        with _autocast_off(entries):
            scaler = (getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
            taken = screen(entries, self.param_groups, self._watch, scaler=scaler, process_group=self._process_group)
            across = [e for e in taken if isinstance(e, ShardedEntry) and not e.is_served_locally(e.rule)]
            elsewhere = set(across)
            step_entries([entry for entry in taken if entry not in elsewhere])
            if across:
                step_shards(across)
        return bool(taken)

    def _rule_of_step(self, group: Mapping[str, Any], role: str, vector: bool, index: int) -> Rule:
        rule = rule_of(group, self.recipe, role, vector=vector, index=index, steps=self.steps_on_device(group))
        return replace(rule, pre_clip=None) if self._pre_clipped else rule

    def _state_of_step(self, parameter: Tensor, position: Position, rule: Rule) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        fit_state(state, rule, parameter, self._name, position)
        return state

    def _counts_of(self, parameter: Tensor, position: Position) -> Mapping[str, Tensor]:
        counts: Mapping[str, Tensor] = self.state.get(parameter, {})
        return counts

    def _prepare(self) -> None:
        """Make missing state, and drop the state of parameters that are no longer in a group."""
        made = False
        for group_index, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                if not self.state.get(parameter) and (parameter.requires_grad or parameter.grad is not None):
                    check_group(group, f"group {group_index}")
                    name = self._name((group_index, index))
                    self.state[parameter] = self.state_of(parameter, group, name)
                    made = True
        if made:
            drop_orphans(self.state, self.param_groups)
            if self.recipe.operator is not None or any(group["clip"] is not None for group in self.param_groups):
                warn_of_long_vectors(self.param_groups)

    def steps_on_device(self, group: Mapping[str, Any]) -> Tensor | None:
        """The group's count of steps as a device scalar, if its threshold needs it and reading it would block."""
        if not varies_with_steps(group):
            return None
        states = [self.state.get(parameter) for parameter in group["params"]]
        steps = [state["step"] for state in states if state]
        if not steps or reading_is_free(steps[0]):
            return None
        return torch.stack(steps).amax()


def _autocast_off(entries: Iterable[Entry]) -> ExitStack:
    """Switch autocast off on the devices of a step, which computes in float32 on purpose."""
    stack = ExitStack()
    for kind in {entry.grad.device.type for entry in entries}:
        if kind != "meta" and torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    return stack
