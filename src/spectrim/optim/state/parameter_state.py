"""Creates the state of parameters, and checks it before a step.

State is made at the first step or at loading, with local shapes, for every parameter that requires a gradient or has
one. Frozen weights therefore need no memory, a model may be sharded or cast after its optimizer was made, and the
checkpoint of an expert that was never used is complete.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spectrim.distributed.dtensor import is_dtensor
from spectrim.distributed.sharding import sharding_of
from spectrim.optim.grouping.flat_shards import check_whole
from spectrim.optim.grouping.layout import Layout, matrix_shapes
from spectrim.optim.rules.rule import Rule, state_dtype_of
from spectrim.optim.sharded.entry import sharded_state

__all__ = ["check_parameter", "drop_orphans", "fit_state", "new_state"]


def check_parameter(parameter: Tensor, name: str) -> None:
    """Raise ValueError, with the name, if a parameter cannot be stepped. Frozen parameters are not checked."""
    if not parameter.requires_grad and parameter.grad is None:
        return
    check_whole(parameter, name)
    if parameter.device.type == "mps":
        raise ValueError(
            f"{name} is on {parameter.device}, which has no float64, in which recipes compute bias corrections and "
            f"norms: expected a device that has, such as a CPU or CUDA"
        )
    if not parameter.is_floating_point():
        raise ValueError(f"{name} has dtype {parameter.dtype}: expected a real floating-point dtype")
    if is_dtensor(parameter):
        sharding_of(parameter, name)


def new_state(parameter: Tensor, rule: Rule, layout: Layout, split: Any, name: str) -> dict[str, Tensor]:
    """New state for a parameter that has taken no step.

    Raises:
        ValueError: the parameter's dtype or sharding is not supported.
    """
    check_parameter(parameter, name)
    kept = state_dtype_of(rule, parameter)
    state = {
        # "skipped" counts the steps that were skipped because this parameter's gradient was not finite.
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "skipped": torch.zeros((), dtype=torch.float32, device=parameter.device),
    }
    for key in rule.direction.keys:
        # For a DTensor this is a DTensor with the same placements, which sharded checkpoints need.
        state[key] = torch.zeros_like(parameter, dtype=kept, requires_grad=False)
    operator = rule.operator
    if operator is not None and operator.keys:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        shapes = matrix_shapes(parameter.shape, layout, split)
        if is_dtensor(parameter):
            # Made whole, for one matrix of a stack, before it is sharded: a basis is small.
            started = operator.start([shape[-2:] for shape in shapes], device=parameter.device, dtype=dtype)
            for key, value in started.items():
                state[key] = sharded_state(parameter, layout, value)
        else:
            state |= operator.start(shapes, device=parameter.device, dtype=dtype)
    return state


def fit_state(
    state: dict[str, Tensor],
    rule: Rule,
    parameter: Tensor,
    name_of: Callable[[tuple[int, int]], str],
    position: tuple[int, int],
) -> None:
    """Convert state to the dtype of a parameter that was cast since it was made.

    Raises:
        RuntimeError: the parameter's shape has changed. Kernels would access memory beyond the state's end.
    """
    wanted = state_dtype_of(rule, parameter)
    for key in rule.direction.keys:
        value = state[key]
        if value.shape != parameter.shape:
            raise RuntimeError(
                f"{name_of(position)} has shape {tuple(parameter.shape)} and its state {key!r} has "
                f"{tuple(value.shape)}: make a new optimizer after changing a parameter's shape"
            )
        if value.dtype not in (torch.bfloat16, wanted):
            state[key] = value.to(wanted)


def drop_orphans(state: dict[Any, Any], groups: list[dict[str, Any]]) -> None:
    """Delete the state of parameters that are in no group any more: FSDP2 integrations replace parameters."""
    held = {parameter for group in groups for parameter in group["params"]}
    for parameter in [parameter for parameter in state if parameter not in held]:
        del state[parameter]
