"""Tests if an optimizer steps shards (DTensors) as it steps whole tensors.

Some optimizers use operations that DTensors do not support, or compute wrong numbers silently. So the optimizer takes a
few steps on a small DTensor with a parameter's placements, which are compared with its steps on the whole tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from spectrim.distributed.collectives import team_of
from spectrim.distributed.dtensor import dtensor_of, is_dtensor
from spectrim.distributed.intervals import take
from spectrim.distributed.sharding import Sharding, sharding_from, sharding_of
from spectrim.optim.wrapping.probe import Miniature, gradients, numbers, options_of, refusal

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["trial_of", "try_shards"]

# Steps of a trial, enough for preconditioners that start after 25.
STEPS = 30
# Tolerance relative to the step. In float64, the same step with sums in another order agrees to 1e-14.
TOLERANCE = 1e-8
# The learning rate of a trial.
RATE = 2.0**-6
# The size of a dimension that no mesh dimension splits.
UNSPLIT = 4


def trial_of(parameter: DTensor, name: str) -> tuple[Any, ...]:
    """A key of a trial: mesh, placements and the shape of the small tensor.

    Raises:
        ValueError: the parameter's sharding is not supported.
    """
    sharding = sharding_of(parameter, name)
    return parameter.device_mesh, tuple(parameter.placements), _small(sharding, parameter, name).shape


def try_shards(optimizer: Optimizer, group: Mapping[str, Any], parameter: DTensor, name: str) -> None:
    """Try an optimizer on a small DTensor with a parameter's placements. Every rank of the mesh calls this.

    The optimizer, its parameters and the host's global random state are not changed.

    Raises:
        ValueError: on every rank, if the steps fail or differ from those on the whole tensor on any rank.
    """
    mesh = parameter.device_mesh
    sharding = _small(sharding_of(parameter, name), parameter, name)
    team = team_of(mesh)
    region = sharding.region(team.member)

    def placed(whole: Tensor) -> DTensor:
        local = take(whole, region).clone(memory_format=torch.contiguous_format).to(mesh.device_type)
        return dtensor_of(local, whole, mesh, parameter.placements)

    reason = None
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            options = options_of(group)
            weight = numbers(sharding.shape, seed=0)
            whole = Miniature(optimizer, options, torch.zeros_like(weight), RATE)
            shards = Miniature(optimizer, options, placed(torch.zeros_like(weight)), RATE)
            for grad in gradients(sharding.shape, STEPS):
                new = whole.step(weight, grad)
                shards.advance(placed(weight), placed(grad))
                found = shards.parameter
                assert is_dtensor(found)
                if not (found.to_local().cpu() - take(new, region)).norm() <= TOLERANCE * (new - weight).norm():
                    # No break: the other ranks take the remaining steps too, which may exchange messages.
                    reason = "its step on shards differs from its step on the whole tensor"
                weight = new
    except Exception as error:
        message = str(error).strip().splitlines() or [""]
        reason = f"its step on shards failed with {type(error).__name__}: {message[0]}"
    reasons = [each for each in team.gather_objects(reason) if each is not None]
    if reasons:
        layout = f"{name!r}, {tuple(parameter.placements)}, tried on shape {sharding.shape}"
        raise refusal(
            optimizer, f"{reasons[0]} ({layout}); expected a base that works entry by entry or supports DTensors"
        )


def _small(sharding: Sharding, parameter: DTensor, name: str) -> Sharding:
    """The sharding of a small tensor with the parameter's placements, even or uneven like the parameter's."""
    parts = [
        math.prod(
            size
            for size, split in zip(sharding.mesh_shape, sharding.splits, strict=True)
            if split is not None and split.dim == dim
        )
        for dim in range(len(sharding.shape))
    ]
    even = tuple(2 * count if count > 1 else UNSPLIT for count in parts)
    shape = tuple(
        whole if count == 1 else size if size < whole else whole + size % count
        for size, count, whole in zip(sharding.shape, parts, even, strict=True)
    )
    try:
        return sharding_from(shape, sharding.mesh_shape, tuple(parameter.placements), name)
    except ValueError:
        # Small strided shards may be too uneven to be supported.
        return replace(sharding, shape=even)
