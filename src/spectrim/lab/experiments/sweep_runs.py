"""The complete search space of every recipe of a sweep, and the run at a point of it."""

from typing import Any

from spectrim.lab.config import OptimizerConfig, SharedConfig, TrainConfig
from spectrim.lab.errors import LabError
from spectrim.lab.experiments.search_space import MULTIPLIER, Dimension, as_settings, default_space, parse_dimension
from spectrim.lab.experiments.settings import ALL, SweepConfig
from spectrim.lab.recipes.names import canonical_names, parse_recipe
from spectrim.lab.settings import merge
from spectrim.lab.training.run import prepare

__all__ = ["canonical", "dimensions_of", "run_at"]


def dimensions_of(config: SweepConfig, recipe: str) -> dict[str, Dimension]:
    """The search space of a recipe, by key; the configuration is canonical."""
    return {key: parse_dimension(key, text) for key, text in config.space[recipe].items()}


def run_at(config: SweepConfig, recipe: str, point: dict[str, Any]) -> TrainConfig:
    """The run at a point of the recipe's space."""
    shared = {key: getattr(config, key) for key in SharedConfig.model_fields}
    settings = merge(merge(config.optimizer.model_dump(), config.overrides.get(recipe, {})), as_settings(point))
    shared["optimizer"] = OptimizerConfig.parse(settings, source=f"sweep of {recipe!r}")
    return prepare(TrainConfig(**shared, recipe=recipe, seed=config.seed))


def canonical(config: SweepConfig) -> SweepConfig:
    """The configuration with canonical recipe names, absolute data paths, and every space complete.

    Raises:
        LabError: a recipe, range or setting is invalid.
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
        # A range for a second hyperparameter replaces the default ones.
        defaults = default_space(recipe)
        kept = {"lr": defaults["lr"]} if given.keys() - {"lr"} else defaults
        update["space"][recipe.name] = {**{key: kept[key] for key in kept if key not in fixed}, **given}
        if not update["space"][recipe.name]:
            raise LabError(f"recipe {recipe.name!r} has nothing left to search: every key of its space is fixed")
    config = config.model_copy(update=update)
    settled = {}
    for name in names:
        point = {key: dimension.grid(3)[0] for key, dimension in dimensions_of(config, name).items()}
        run = run_at(config, name, point)
        settled = {key: getattr(run, key) for key in ("data", "model", "precision")}
    return config.model_copy(update=settled)
