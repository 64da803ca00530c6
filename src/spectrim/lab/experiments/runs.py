"""The runs of comparisons and sweeps: their settings, and checks that stored results belong to the same settings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spectrim.lab.config import AnyShared, OptimizerConfig, SharedConfig, TrainConfig, without_paths
from spectrim.lab.errors import LabError
from spectrim.lab.experiments.search_space import MULTIPLIER, Dimension, as_settings, default_space, parse_dimension
from spectrim.lab.experiments.settings import ALL, SweepConfig
from spectrim.lab.recipes.names import canonical_names, parse_recipe
from spectrim.lab.settings import describe_differences, merge
from spectrim.lab.training.folder import RunFolder
from spectrim.lab.training.run import prepare

__all__ = [
    "by_canonical_name",
    "canonical_sweep",
    "check_same_settings",
    "check_same_text",
    "dimensions_of",
    "run_at",
    "run_of",
]


def run_of(
    config: SharedConfig, recipe: str, seed: int, *values: dict[str, Any], source: str, **more: Any
) -> TrainConfig:
    """One run: the shared settings, with hyperparameters in ``values`` (later ones win) and other settings in ``more``.

    Raises:
        LabError: a hyperparameter is invalid; the message begins with ``source``.
    """
    shared = {key: getattr(config, key) for key in SharedConfig.model_fields}
    optimizer = config.optimizer.model_dump()
    for table in values:
        optimizer = merge(optimizer, table)
    shared["optimizer"] = OptimizerConfig.parse(optimizer, source=source)
    return prepare(TrainConfig(**{**shared, **more}, recipe=recipe, seed=seed))


def by_canonical_name(
    table: Mapping[str, Any], key: str, recipes: Sequence[str], kind: str, *, everyone: str | None = None
) -> dict[str, Any]:
    """A table under canonical recipe names; ``everyone`` is a key that stands for all recipes.

    Raises:
        LabError: a name is not among the recipes.
    """
    named = {name if name == everyone else parse_recipe(name).name: value for name, value in table.items()}
    for name in named:
        if name not in (*recipes, everyone):
            flag = "--" + key.replace("_", "-").removesuffix("s")
            raise LabError(f"{flag} {name}: not in this {kind}, expected one of {', '.join(recipes)}")
    return named


def check_same_settings(kind: str, path: Path, stored: AnyShared, asked: AnyShared) -> None:
    """Refuse to continue a run, comparison or sweep with other settings; paths of data may differ."""
    if changes := describe_differences(without_paths(stored), without_paths(asked)):
        raise LabError(f"{kind} {str(path)!r} has other settings: {changes}; choose another --name")


def check_same_text(folder: RunFolder, data_key: str) -> None:
    """Refuse a finished run on other text."""
    if (finished := folder.result()) is not None and finished.data_key != data_key:
        raise LabError(f"{str(folder.path)!r} was trained on other text than the data holds now; choose another --name")


def dimensions_of(config: SweepConfig, recipe: str) -> dict[str, Dimension]:
    """The search space of a recipe, by key; the configuration is canonical."""
    return {key: parse_dimension(key, text) for key, text in config.space[recipe].items()}


def run_at(config: SweepConfig, recipe: str, point: dict[str, Any]) -> TrainConfig:
    """The run at a point of the recipe's space."""
    fixed = config.overrides.get(recipe, {})
    return run_of(config, recipe, config.seed, fixed, as_settings(point), source=f"sweep of {recipe!r}")


def canonical_sweep(config: SweepConfig) -> SweepConfig:
    """The configuration with canonical recipe names, absolute data paths, and every space complete.

    Raises:
        LabError: a recipe, range or setting is invalid.
    """
    names = canonical_names(config.recipes)
    update: dict[str, Any] = {
        "recipes": names,
        "overrides": by_canonical_name(config.overrides, "overrides", names, "sweep"),
        "space": by_canonical_name(config.space, "space", names, "sweep", everyone=ALL),
    }
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
    # One run of every recipe, so that each is checked.
    points = {name: {key: each.grid(3)[0] for key, each in dimensions_of(config, name).items()} for name in names}
    *_, run = (run_at(config, name, point) for name, point in points.items())
    return config.model_copy(update={key: getattr(run, key) for key in ("data", "model", "precision")})
