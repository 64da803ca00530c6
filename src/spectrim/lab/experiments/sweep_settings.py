"""What a sweep searches and how: its settings, and the space of every recipe made complete. Relied on by the sweep."""

from typing import Any, Literal

from pydantic import Field

from spectrim.lab.config import (
    MonitorConfig,
    OptimizerConfig,
    PositiveInt,
    Recipes,
    Seed,
    SharedConfig,
    TrainConfig,
    merge,
)
from spectrim.lab.errors import LabError
from spectrim.lab.experiments.search_space import MULTIPLIER, Dimension, as_settings, default_space, parse_dimension
from spectrim.lab.recipes.names import canonical_names, parse_recipe
from spectrim.lab.training.run import prepare

__all__ = ["ALL", "SweepConfig", "canonical"]

ALL = "*"
"""Stands for every recipe in a space."""


class SweepConfig(SharedConfig):
    """Settings of a sweep."""

    recipes: Recipes
    trials: PositiveInt = 12
    """Trials of each recipe; a grid has as many as it has points."""
    seed: Seed = 0
    """Seed of every trial, and of the search."""
    method: Literal["optuna", "grid"] = "optuna"
    pruner: Literal["median", "hyperband", "none"] = "median"
    """How trials that fall behind are stopped early."""
    monitor: MonitorConfig = MonitorConfig(every=0)
    """Off unless asked for: trials are many, and only their losses are compared."""
    overrides: dict[str, dict[str, Any]] = Field(default={})
    """A fixed value for any key of the table optimizer of one recipe."""
    space: dict[str, dict[str, str]] = Field(
        default={}, json_schema_extra={"default": "the learning rate and one or two more"}
    )
    """LOW:HIGH, LOW:HIGH:linear or A,B,C for a key of the table optimizer, or for multiplier, which is embedding_lr
    and head_lr together."""

    def dimensions(self, recipe: str) -> dict[str, Dimension]:
        """What is searched for a recipe; the configuration is canonical."""
        return {key: parse_dimension(key, text) for key, text in self.space[recipe].items()}

    def run(self, recipe: str, point: dict[str, Any]) -> TrainConfig:
        """The run at a point of the recipe's space."""
        shared = {key: getattr(self, key) for key in SharedConfig.model_fields}
        settings = merge(merge(self.optimizer.model_dump(), self.overrides.get(recipe, {})), as_settings(point))
        shared["optimizer"] = OptimizerConfig.parse(settings, source=f"sweep of {recipe!r}")
        return prepare(TrainConfig(**shared, recipe=recipe, seed=self.seed))


def canonical(config: SweepConfig) -> SweepConfig:
    """The configuration with canonical recipe names, absolute data paths, and every space complete.

    Raises:
        LabError: a recipe, range or setting is not served.
    """
    names = canonical_names(config.recipes)
    update: dict[str, Any] = {"recipes": names}
    for key in ("overrides", "space"):
        table = {
            name if name == ALL else parse_recipe(name).name: entry for name, entry in getattr(config, key).items()
        }
        for name in table:
            if name not in (*names, ALL) or (name == ALL and key == "overrides"):
                raise LabError(
                    f"--{key.removesuffix('s')} {name}: not in this sweep, expected one of {', '.join(names)}"
                )
        update[key] = table
    everyones = update["space"].pop(ALL, {})
    for recipe in map(parse_recipe, names):
        given = everyones | update["space"].get(recipe.name, {})
        everywhere = {key for key, value in config.optimizer.model_dump().items() if value is not None}
        fixed = everywhere | update["overrides"].get(recipe.name, {}).keys()
        if fixed & {"embedding_lr", "head_lr"}:
            fixed.add(MULTIPLIER)
        # Somebody who names a second hyperparameter has decided what is searched beside the learning rate.
        defaults = default_space(recipe)
        kept = {"lr": defaults["lr"]} if given.keys() - {"lr"} else defaults
        update["space"][recipe.name] = {**{key: kept[key] for key in kept if key not in fixed}, **given}
        if not update["space"][recipe.name]:
            raise LabError(f"recipe {recipe.name!r} has nothing left to search: every key of its space is fixed")
    config = config.model_copy(update=update)
    settled = {}
    for name in names:
        point = {key: dimension.grid(3)[0] for key, dimension in config.dimensions(name).items()}
        run = config.run(name, point)
        settled = {key: getattr(run, key) for key in ("data", "model", "precision")}
    return config.model_copy(update=settled)
