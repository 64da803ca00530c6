"""Loading state dicts of the same class, of an older release, or of the torch optimizer with the same moments.

Everything is checked and converted before the optimizer changes. Hooks run as torch documents them.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spectrim.distributed.dtensor import is_dtensor
from spectrim.optim.directions import Adam
from spectrim.optim.grouping.layout import matrix_shapes
from spectrim.optim.rules.rule import Rule, state_dtype_of
from spectrim.optim.rules.schedule import peak_lr_of
from spectrim.optim.stepping.entries import parameter_name, role_and_layout

if TYPE_CHECKING:
    from spectrim.optim.optimizer import SpectralOptimizer

__all__ = ["load_state"]

#: Values of a group that describe its parameters. They are never loaded from a state dict.
_STRUCTURE = ("params", "param_names", "role", "layout", "split", "matrices")
_COUNTS = ("step", "skipped")


def load_state(optimizer: SpectralOptimizer, state_dict: dict[str, Any]) -> None:
    """Load a state dict; see :meth:`SpectralOptimizer.load_state_dict`.

    Raises:
        ValueError: groups, shapes or state do not fit; the message names them. Nothing is changed then.
    """
    state_dict = dict(state_dict)
    for before in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = before(optimizer, state_dict)
        state_dict = state_dict if replaced is None else replaced
    saved_groups: list[dict[str, Any]] = state_dict["param_groups"]
    sources = _sources(optimizer.param_groups, saved_groups)
    groups: list[dict[str, Any]] = []
    state: dict[Any, Any] = {key: value for key, value in state_dict["state"].items() if not isinstance(key, int)}
    for group, indices, saved in zip(optimizer.param_groups, *sources, strict=True):
        completed = _completed(group, saved, state_dict["state"], indices)
        theirs, mine = saved.get("recipe", group["recipe"]), group["recipe"]
        if theirs not in (mine, Adam.name):
            kind = type(optimizer).__name__
            raise ValueError(f"a state dict of the recipe {theirs!r} for {kind}, which is {mine!r}")
        groups.append(completed)
        for place, (parameter, index) in enumerate(zip(group["params"], indices, strict=True)):
            if found := state_dict["state"].get(index):
                name = parameter_name([{**completed, "param_names": group.get("param_names")}], (0, place))
                state[parameter] = _converted(optimizer, completed, parameter, found, name)
    # As torch's optimizers keep it: in a defaultdict, if the optimizer has one.
    kept = defaultdict(dict, state) if hasattr(optimizer.state, "default_factory") else state
    optimizer.__setstate__({"state": kept, "param_groups": groups})
    for after in optimizer._optimizer_load_state_dict_post_hooks.values():
        after(optimizer)


def _sources(
    groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> tuple[list[list[int]], list[Mapping[str, Any]]]:
    """Match parameters by name if both sides have names, else by position.

    Returns:
        For every group, the saved index of each of its parameters; and the saved group whose options it takes.
    """
    mine, theirs = _names(groups), _names(saved)
    if mine and theirs and set(mine) <= set(theirs):
        places = {
            name: (index, group)
            for group in saved
            for name, index in zip(group["param_names"], group["params"], strict=True)
        }
        indices = [[places[name][0] for name in group["param_names"]] for group in groups]
        return indices, [places[group["param_names"][0]][1] if group["params"] else {} for group in groups]
    sizes, saved_sizes = [len(group["params"]) for group in groups], [len(group["params"]) for group in saved]
    if sizes != saved_sizes:
        raise ValueError(
            f"a state dict with groups of {saved_sizes} parameters for an optimizer with groups of {sizes}: expected "
            f"the same groups, or names of parameters on both sides. Optimizers have names if they are made from "
            f"model.named_parameters() or spectrim.param_groups(model)"
        )
    return [list(group["params"]) for group in saved], list(saved)


def _names(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of all parameters, or an empty list if any is missing or two are equal."""
    names: list[str] = []
    for group in groups:
        if group["params"] and len(group.get("param_names") or ()) != len(group["params"]):
            return []
        names += group.get("param_names") or ()
    return names if len(set(names)) == len(names) else []


def _completed(
    group: Mapping[str, Any], saved: Mapping[str, Any], state: Mapping[Any, Any], indices: Sequence[int]
) -> dict[str, Any]:
    """The group, with saved options in place of its own where the saved group has them."""
    kept = {key: value for key, value in saved.items() if key not in _STRUCTURE}
    if "name" in group:
        # Two groups may take their options from one, and loggers want names of their own.
        kept.pop("name", None)
    if "steps_taken" in saved and "lr_factor" not in saved and "lr_scale" in saved:
        # The old name of lr_factor. Without steps_taken, "lr_scale" is timm's option, which stays as it is.
        kept["lr_factor"] = kept.pop("lr_scale")
    completed = {**group, **copy.deepcopy(kept)}
    if "steps_taken" not in saved:
        steps = [float(state[index]["step"]) for index in indices if "step" in state.get(index, {})]
        completed["steps_taken"] = int(max(steps, default=0.0))
        if group.get("role") == "vector":
            # The other class may have had vectors in a group with decay.
            completed["weight_decay"] = group["weight_decay"]
        # Learning rates of another class do not include this group's factor yet.
        for key in ("lr", "initial_lr", "max_lr", "min_lr"):
            if key in saved and group["lr_factor"] != 1.0:
                completed[key] = saved[key] * group["lr_factor"]
        if completed["steps_taken"]:
            completed["largest_lr"] = peak_lr_of(completed)  # the other class's warm-up counts as over
    return completed


def _converted(
    optimizer: SpectralOptimizer, group: Mapping[str, Any], parameter: Tensor, saved: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """A parameter's saved state, converted to its device and the optimizer's dtypes."""
    rule = optimizer.rule_of(group, parameter)
    shapes = _expected_shapes(rule, group, parameter)
    for key in saved:
        if key not in shapes and key not in _COUNTS:
            raise ValueError(
                f"state {key!r} of {name}, whose rule is {rule.label!r}: expected {', '.join(map(repr, shapes))}. It "
                f"belongs to another optimizer"
            )
    state: dict[str, Any] = {}
    for key in _COUNTS:
        number = torch.as_tensor(saved.get(key, 0.0), dtype=torch.float32)
        state[key] = number.detach().to(parameter.device).reshape(())
    for key, shape in shapes.items():
        if key not in saved:
            continue
        value = saved[key]
        if tuple(value.shape) != shape:
            raise ValueError(f"state {key!r} of {name} has shape {tuple(value.shape)}: expected {shape}")
        if is_dtensor(parameter) != is_dtensor(value):
            raise ValueError(
                f"state {key!r} of {name} is a {type(value).__name__} where the parameter is a "
                f"{type(parameter).__name__}: load sharded state by torch.distributed.checkpoint.state_dict"
            )
        wide = torch.promote_types(parameter.dtype, torch.float32)
        dtype = state_dtype_of(rule, parameter) if key in rule.direction.keys else wide
        state[key] = value.detach().to(device=parameter.device, dtype=dtype)
    missing = [key for key in shapes if key not in state]
    if missing:
        fresh = optimizer.state_of(parameter, group, name)
        state |= {key: fresh[key] for key in missing}
    return state


def _expected_shapes(rule: Rule, group: Mapping[str, Any], parameter: Tensor) -> dict[str, tuple[int, ...]]:
    shapes = {key: tuple(parameter.shape) for key in rule.direction.keys}
    if rule.operator is not None:
        _, layout = role_and_layout(group, parameter)
        matrices = matrix_shapes(parameter.shape, layout, group.get("split"))
        started = rule.operator.start(matrices, device=torch.device("meta"), dtype=torch.float32)
        shapes |= {key: tuple(value.shape) for key, value in started.items()}
    return shapes
