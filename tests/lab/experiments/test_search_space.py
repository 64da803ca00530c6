import math

import pytest

from spectrim.lab.errors import LabError
from spectrim.lab.experiments.search_space import (
    Categorical,
    Range,
    as_settings,
    default_space,
    parse_dimension,
    spread_points,
    starting_point,
)
from spectrim.lab.recipes.names import defaults_table, parse_recipe


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("lr", "1e-4:1e-2", Range(1e-4, 1e-2, True)),
        ("lr", "0:1", Range(0.0, 1.0, False)),
        ("momentum", "0.8:0.99", Range(0.8, 0.99, False)),
        ("clip_bound", "0.01:0.02:linear", Range(0.01, 0.02, False)),
        ("orthogonalize_steps", "3,5,7", Categorical((3, 5, 7))),
        ("nesterov", "true,false", Categorical((True, False))),
        ("scale", "original,match_rms_adamw", Categorical(("original", "match_rms_adamw"))),
    ],
)
def test_ranges_and_choices_are_read(key: str, text: str, expected: object) -> None:
    assert parse_dimension(key, text) == expected


@pytest.mark.parametrize("text", ["2:1", "a:b", "1:2:3", "0:1:log", "1:inf", "[1,2],[3]", ""])
def test_what_is_neither_is_refused_by_its_key(text: str) -> None:
    with pytest.raises(LabError, match=r"space lr='"):
        parse_dimension("lr", text)


def test_a_grid_has_both_ends_and_even_ratios() -> None:
    assert Range(1.0, 16.0, True).grid(5) == pytest.approx([1, 2, 4, 8, 16])
    assert Range(0.8, 1.0, False).grid(3) == pytest.approx([0.8, 0.9, 1.0])
    assert max(Range(0.1, 0.3, True).grid(7)) == 0.3


def test_the_edges_of_a_range_are_told() -> None:
    assert Range(1e-4, 1e-2, True).at_edge(1.1e-4)
    assert Range(1e-4, 1e-2, True).at_edge(0.95e-2)
    assert not Range(1e-4, 1e-2, True).at_edge(1e-3)
    assert Categorical((3, 5, 7)).at_edge(3)
    assert not Categorical((3, 5, 7)).at_edge(5)
    assert not Categorical((True, False)).at_edge(True)


@pytest.mark.parametrize(
    ("recipe", "keys"),
    [
        ("adamw", {"lr", "multiplier"}),
        ("adamw+clip", {"lr", "clip_bound", "multiplier"}),
        ("adamw+shrink+clip", {"lr", "clip_bound", "shrink_factor"}),
        ("spectra", {"lr", "rank_ratio", "multiplier"}),
        ("muon", {"lr", "momentum", "multiplier"}),
        ("torch.optim:NAdam", {"lr", "multiplier"}),
        ("torch.optim:NAdam+clip", {"lr", "clip_bound", "multiplier"}),
    ],
)
def test_every_recipe_is_searched_around_its_own_defaults(recipe: str, keys: set[str]) -> None:
    parsed = parse_recipe(recipe)
    space = {key: parse_dimension(key, text) for key, text in default_space(parsed).items()}
    assert space.keys() == keys
    start = starting_point(parsed, space)
    assert start.keys() == keys
    if recipe in defaults_table():
        assert start["lr"] == defaults_table()[recipe].lr


def test_a_start_outside_the_space_is_left_out() -> None:
    assert starting_point(parse_recipe("adamw"), {"lr": Range(10.0, 20.0, True)}) == {}


def test_a_point_becomes_settings() -> None:
    point = {"lr": 0.1, "multiplier": 4.0, "arguments.eps": 1e-6}
    assert as_settings(point) == {"lr": 0.1, "embedding_lr": 4.0, "head_lr": 4.0, "arguments": {"eps": 1e-6}}


def test_spread_points_have_one_in_every_slice_of_every_range() -> None:
    space = {"lr": Range(1.0, 16.0, True), "momentum": Range(0.0, 0.8, False), "scale": Categorical(("a", "b"))}
    points = spread_points(space, 4, seed=3)
    assert sorted(int(math.log2(point["lr"])) for point in points) == [0, 1, 2, 3]
    assert sorted(int(point["momentum"] / 0.2) for point in points) == [0, 1, 2, 3]
    assert sorted(point["scale"] for point in points) == ["a", "a", "b", "b"]
    assert spread_points(space, 4, seed=3) == points
    assert spread_points(space, 0, seed=3) == []
