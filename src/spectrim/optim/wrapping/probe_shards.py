"""Whether an optimizer steps shards as it steps the whole: tried, not read from its class.

torch's DTensors promise that every operation on shards means the same on the whole, but not every optimizer keeps to
operations that they know, and some give other numbers silently. So the optimizer takes a few steps on a small DTensor
of a parameter's layout, and they are compared with its steps on the whole. Relied on by
:class:`.SpectralClipping`.
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
from spectrim.distributed.dtensor import is_dtensor
from spectrim.distributed.intervals import take
from spectrim.distributed.sharding import Sharding, sharding_from, sharding_of
from spectrim.optim.wrapping.probe import Miniature, gradients, numbers, options_of, refusal

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["trial_of", "try_shards"]

# Steps of a trial, enough for preconditioners that begin after 25.
STEPS = 30
# Relative to the step. In float64 the same step taken in another order agrees to 1e-14.
TOLERANCE = 1e-8
# Not so small that every step is as large as the weights, nor so large that rounding of the weights shows.
RATE = 2.0**-6
# The size of a dimension that no mesh dimension splits.
UNSPLIT = 4


def trial_of(parameter: DTensor, name: str) -> tuple[Any, ...]:
    """What a trial depends on beside the optimizer's options: the mesh, the placements and the shape tried.

    Raises:
        ValueError: a layout that is not served, by name.
    """
    sharding = sharding_of(parameter, name)
    return parameter.device_mesh, tuple(parameter.placements), _small(sharding, parameter, name).shape


def try_shards(optimizer: Optimizer, group: Mapping[str, Any], parameter: DTensor, name: str) -> None:
    """Try an optimizer on shards laid out like a parameter's. Every rank of the mesh calls this; all go on, or none.

    The optimizer, its parameters and the global random state of the host stay as they are.

    Raises:
        ValueError: its steps fail, or are not those on the whole, with the parameter's name and the reason.
    """
    from torch.distributed.tensor import DTensor

    mesh = parameter.device_mesh
    sharding = _small(sharding_of(parameter, name), parameter, name)
    team = team_of(mesh)
    region = sharding.region(team.member)

    def placed(whole: Tensor) -> DTensor:
        local = take(whole, region).clone(memory_format=torch.contiguous_format).to(mesh.device_type)
        return DTensor.from_local(
            local, mesh, parameter.placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )

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
                    # The steps go on, since other ranks take them too.
                    reason = "its step on shards is not its step on the whole"
                weight = new
    except Exception as error:
        message = str(error).strip().splitlines() or [""]
        reason = f"its step on shards failed with {type(error).__name__}: {message[0]}"
    reasons = [each for each in team.gather_objects(reason) if each is not None]
    if reasons:
        layout = f"{name!r}, {tuple(parameter.placements)}, tried on shape {sharding.shape}"
        raise refusal(
            optimizer, f"{reasons[0]} ({layout}); expected a base that works entry by entry, or knows DTensors"
        )


def _small(sharding: Sharding, parameter: DTensor, name: str) -> Sharding:
    """The sharding of a small tensor laid out like a large one, as evenly or unevenly."""
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
        # Strided shards of which small ones are too uneven to be served.
        return replace(sharding, shape=even)
