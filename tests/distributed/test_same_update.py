"""Given the same gradients, many processes move the parameters as one does, in every layout and recipe."""

import functools

import pytest

import sharded_cases as cases
import sharded_workers
import worlds

TOLERANCE = 1e-5


FEW = ["signum+clip", "spectra", "muon"]
TRIED = {
    2: {"replicated": ["muon"], "columns": ["adamw+shrink+preclip+clip"]},
    4: {
        "fsdp": [*cases.RECIPES],
        "columns": ["spectra"],
        "hsdp": FEW,
        "fsdp+tp": FEW,
        "blocks": [*FEW, "adamw+shrink+preclip+clip"],
        "replicas of columns": FEW,
        "rows twice": ["spectra"],
        "experts and their columns": FEW,
    },
}


@functools.cache
def results(world: int):
    return worlds.run(world, sharded_workers.every_layout, world, TRIED[world])


@functools.cache
def expected(recipe: str):
    return cases.single(recipe, sharded_workers.STEPS)


@pytest.mark.parametrize(
    ("world", "layout", "recipe"),
    [(world, layout, recipe) for world, found in TRIED.items() for layout in found for recipe in found[layout]],
)
def test_many_processes_move_parameters_as_one_does(world, layout, recipe):
    per_rank = results(world)
    parameters, agree = per_rank[0][layout, recipe]
    before, after = cases.start(), expected(recipe)
    for name, tensor in parameters.items():
        moved = (after[name] - before[name]).norm()
        assert (tensor - after[name]).norm() <= TOLERANCE * moved, name
    assert agree
    assert all(per_rank[rank][layout, recipe] for rank in range(1, world))
