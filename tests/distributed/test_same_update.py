"""Given the same gradients, many processes move the parameters as one does, in every layout and recipe."""

import functools

import pytest
import torch

import sharded_cases as cases
import sharded_workers
import worlds

TOLERANCE = 1e-5


FEW = ["signum+clip", "spectra", "muon"]
ELSEWHERE = ["muon+shrink", *(recipe for recipe in cases.RECIPES if "around" in recipe and recipe != "around AdamW")]
TRIED = {
    2: {
        "replicated": ["muon", "muon+shrink"],
        "columns": ["adamw+shrink+preclip+clip", "mars+preclip+clip", "around SGD", "around AdamW, nothing clipped"],
        "mixed": [
            "pre-clipped ahead",
            "adamw+clip",
            "adamw+shrunk directions",
            "around AdamW",
            "around one that rests first",
        ],
    },
    4: {
        "fsdp": [recipe for recipe in cases.RECIPES if recipe not in ELSEWHERE],
        "columns": ["spectra"],
        "hsdp": FEW,
        "fsdp+tp": [*FEW, "around AdamW"],
        "blocks": [*FEW, "mars", "adamw+shrink+preclip+clip", "around SGD"],
        "replicas of columns": [*FEW, "mars"],
        "rows twice": ["spectra"],
        "experts and their columns": [*FEW, "mars", "around NAdam, matrices"],
    },
}
GRADIENTS = {2: ["replicated", "mixed"], 4: ["fsdp", "fsdp+tp"]}


@functools.cache
def results(world: int):
    return worlds.run(world, sharded_workers.one_process_against_many, world, TRIED[world], GRADIENTS[world])


@functools.cache
def expected(recipe: str):
    return cases.single(recipe, sharded_workers.STEPS)


@pytest.mark.parametrize(
    ("world", "layout", "recipe"),
    [(world, layout, recipe) for world, found in TRIED.items() for layout in found for recipe in found[layout]],
)
def test_many_processes_move_parameters_as_one_does(world, layout, recipe):
    per_rank = [updates for updates, _ in results(world)]
    parameters, agree = per_rank[0][layout, recipe]
    before, after = cases.start(), expected(recipe)
    for name, tensor in parameters.items():
        moved = (after[name] - before[name]).norm()
        assert (tensor - after[name]).norm() <= TOLERANCE * moved, name
    assert agree
    assert all(per_rank[rank][layout, recipe] for rank in range(1, world))


@pytest.mark.parametrize(
    ("world", "layout", "utility"),
    [(world, layout, utility) for world, found in GRADIENTS.items() for layout in found for utility in cases.UTILITIES],
)
def test_many_processes_clip_and_shrink_gradients_as_one_does(world, layout, utility):
    for _, gradients in results(world):
        left, numbers, agree = gradients[layout, utility]
        expected, expected_numbers = cases.single_gradients(utility, list(left))
        for name, tensor in left.items():
            before = cases.gradient(name, 0)
            assert (tensor - expected[name]).norm() <= TOLERANCE * before.norm(), name
            assert (utility == "clip, hard" and len(before.shape) == 1) or not torch.equal(tensor, before), name
        for mine, its in zip(numbers, expected_numbers, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
        assert agree
