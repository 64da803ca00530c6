"""What the ranks of tests/distributed run."""

import torch
import torch.distributed as dist

import sharded_cases as cases

STEPS = 20

#: What layouts are tried on beside FSDP, which is tried on everything.
SOME = ("wide", "tall", "uneven", "fused", "experts", "bias", "short")


def every_layout(rank: int, world: int, recipes: dict[str, list[str]]):
    """For the recipes of every layout, the parameters after some steps; and whether replicas agree."""
    found = {}
    for layout, make in cases.layouts(world):
        for recipe in recipes.get(layout, ()):
            parameters = make()
            if layout != "fsdp":
                parameters = {name: parameters[name] for name in SOME}
            optimizer = cases.RECIPES[recipe](cases.groups(parameters))
            for number in range(STEPS):
                cases.step(optimizer, parameters, number)
            found[layout, recipe] = cases.whole(parameters), replicas_agree(parameters)
    return found if rank == 0 else {key: agree for key, (_, agree) in found.items()}


def replicas_agree(parameters) -> bool:
    for parameter in parameters.values():
        for dim, placement in enumerate(parameter.placements):
            if placement.is_replicate():
                mine = parameter.to_local().detach()
                all_of_them = [torch.empty_like(mine) for _ in range(parameter.device_mesh.size(dim))]
                dist.all_gather(all_of_them, mine.contiguous(), group=parameter.device_mesh.get_group(dim))
                if not all(torch.equal(mine, other) for other in all_of_them):
                    return False
    return True
