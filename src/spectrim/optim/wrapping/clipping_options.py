"""Adds the options of :class:`.SpectralClipping` to another optimizer's groups, which keep options that they state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from spectrim.optim.grouping.options import ClippingOptions, finish_group
from spectrim.optim.rules.schedule import peak_lr_of

__all__ = ["ADDED_KEYS", "CLIPPING_KEYS", "clipping_values"]


#: The options of the clip.
CLIPPING_KEYS = ("clip", *ClippingOptions.__annotations__)
#: Keys that the wrapper adds to every group of its base.
ADDED_KEYS = (*CLIPPING_KEYS, "split", "lr_factor", "steps_taken", "first_lr", "largest_lr")
_STRUCTURE = ("params", "param_names", "role", "layout", "split", "lr", "lr_factor")


def clipping_values(base: Optimizer, index: int, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the wrapper adds to a group of the base, and the learning rate. The group is not changed.

    Raises:
        ValueError: a value is not allowed, or neither the base nor the wrapper has an option.
    """
    group = base.param_groups[index]
    where = f"group {index} of {type(base).__name__}"
    clashing = [key for key in (*CLIPPING_KEYS, "steps_taken") if key in base.defaults]
    if clashing:
        raise ValueError(f"{clashing[0]!r} is an option of both {type(base).__name__} and SpectralClipping")
    for key, default in defaults.items():
        ours = key in base.defaults or key in (*CLIPPING_KEYS, *_STRUCTURE, "weight_decay")
        if not ours and group.get(key, default) != default:
            raise ValueError(f"{key}={group[key]!r} for {where}: neither that class nor SpectralClipping has it")
    values = {key: group[key] for key in (*CLIPPING_KEYS, *_STRUCTURE) if key in group}
    values["lr"] = _scaled_lr(base, group, where)
    finish_group(values, defaults, index)
    peak = peak_lr_of({**group, **values})
    if peak == 0 and (values["clip"] == "auto" or values["warmup_steps"] not in ("auto", 0)):
        raise ValueError(f"peak_lr=0.0 for {where}: expected the peak learning rate, to which the threshold refers")
    if "steps_taken" not in group and any(base.state.get(parameter) for parameter in group["params"]):
        values["largest_lr"] = peak  # steps of the bare base: its warm-up counts as over
    return {key: values[key] for key in (*ADDED_KEYS, "lr")}


def _scaled_lr(base: Optimizer, group: Mapping[str, Any], where: str) -> Any:
    """The group's learning rate, multiplied by its ``lr_factor`` if it is the base's default."""
    lr, factor = group["lr"], group.get("lr_factor", 1.0)
    if factor == 1.0 or "steps_taken" in group or group.get("initial_lr", lr) != base.defaults["lr"]:
        return lr
    if "initial_lr" in group:
        raise ValueError(
            f"lr_factor={factor} for {where}, which has a scheduler: wrap the optimizer before making the scheduler"
        )
    return lr * factor
