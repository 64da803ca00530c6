"""Settings of comparisons and sweeps. Imports no torch, so that ``--help`` answers at once."""

from typing import Any, Literal

from pydantic import Field

from spectrim.lab.config import MonitorConfig, Recipes, Seeds, SharedConfig
from spectrim.lab.settings import PositiveFloat, PositiveInt, Seed, unset

__all__ = ["ALL", "RATES", "CompareConfig", "SweepConfig"]

RATES = ("lr", "embedding_lr", "head_lr", "clip_bound")
"""Hyperparameters that a comparison sets by recipe."""

ALL = "*"
"""Stands for every recipe in a space."""

Rates = dict[str, PositiveFloat]


def by_recipe() -> Any:
    """A table of one number for each recipe."""
    return Field(default={}, json_schema_extra={"default": "the recipe's own"})


class CompareConfig(SharedConfig):
    """Settings of a comparison."""

    recipes: Recipes = ("adamw", "adamw+clip", "spectra", "muon")
    seeds: Seeds = (0,)
    """Every recipe is trained once with each seed, which decides initial weights and batches."""
    lr: Rates = by_recipe()
    """Peak learning rate."""
    embedding_lr: Rates = by_recipe()
    """Factor on the learning rate for embeddings."""
    head_lr: Rates = by_recipe()
    """Factor on the learning rate for the output head."""
    clip_bound: Rates = by_recipe()
    """For recipes with +clip, the threshold times the peak learning rate."""
    overrides: dict[str, dict[str, Any]] = Field(default={})
    """Any key of the table optimizer for one recipe; --lr and the other rates win over it."""
    equal: Literal["tokens", "time"] = "tokens"
    """Give every recipe the same number of tokens, or the same training time, in which fast ones take more steps."""
    seconds: PositiveFloat | None = unset("the time that AdamW takes for --steps")
    """Training time of every recipe, for a comparison at equal time."""


class SweepConfig(SharedConfig):
    """Settings of a sweep."""

    recipes: Recipes
    trials: PositiveInt = 12
    """Trials of each recipe; a grid has as many as it has points."""
    seed: Seed = 0
    """Seed of every trial, and of the search."""
    method: Literal["optuna", "grid"] = "optuna"
    pruner: Literal["median", "hyperband", "none"] = "median"
    """Stops trials that fall behind."""
    monitor: MonitorConfig = MonitorConfig(every=0)
    """Off by default: a sweep has many trials and compares only their losses."""
    overrides: dict[str, dict[str, Any]] = Field(default={})
    """A fixed value for any key of the table optimizer of one recipe."""
    space: dict[str, dict[str, str]] = Field(
        default={}, json_schema_extra={"default": "the learning rate and one or two more"}
    )
    """LOW:HIGH, LOW:HIGH:linear or A,B,C for a key of the table optimizer, or for multiplier, which is embedding_lr
    and head_lr together."""
