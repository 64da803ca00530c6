"""A comparison: recipes x seeds over the same text, batches and initial weights, each run in a folder of its own.

``runs/NAME/RECIPE/seed-S/`` is a run like any other. Calling a comparison again does only what is missing, so an
interrupted one goes on and a finished one only rewrites its report; recipes and seeds may be added, nothing else may
change under the same name.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import Field, field_validator

from spectrim.lab.config import PositiveFloat, Seed, SharedConfig, TrainConfig, describe_differences, read_toml
from spectrim.lab.errors import LabError
from spectrim.lab.files import write_text
from spectrim.lab.log import Record
from spectrim.lab.recipes import parse_recipe
from spectrim.lab.results import BASELINE, RunResult, summarise
from spectrim.lab.run import RunFolder
from spectrim.lab.tokens import prepare_tokens
from spectrim.lab.train import prepare, train

__all__ = ["DEFAULT_RECIPES", "CompareConfig", "Monitor", "compare"]

DEFAULT_RECIPES = (BASELINE, "adamw+clip", "spectra", "muon")

RATES = ("lr", "embedding_lr", "head_lr", "clip_bound")

Rates = dict[str, PositiveFloat]


class CompareConfig(SharedConfig):
    """What is compared, and what all runs have in common."""

    recipes: Annotated[tuple[str, ...], Field(min_length=1)] = DEFAULT_RECIPES
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    lr: Rates = Field(default={})
    """Learning rates by recipe, where not the recipe's default."""
    embedding_lr: Rates = Field(default={})
    head_lr: Rates = Field(default={})
    clip_bound: Rates = Field(default={})

    @field_validator("recipes", "seeds")
    @classmethod
    def _distinct(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) < len(values):
            raise ValueError("each may stand once only")
        return values

    def runs(self) -> Iterator[TrainConfig]:
        """Every run, complete with its hyperparameters; one seed of all recipes before the next seed."""
        shared = {key: getattr(self, key) for key in SharedConfig.model_fields}
        for seed in self.seeds:
            for recipe in self.recipes:
                rates = {key: by[recipe] for key in RATES if recipe in (by := getattr(self, key))}
                optimizer = self.optimizer.model_copy(update=rates)
                yield prepare(TrainConfig(**{**shared, "optimizer": optimizer}, recipe=recipe, seed=seed))


class Monitor(Protocol):
    """What a comparison tells whoever watches it."""

    def run_started(self, config: TrainConfig) -> None:
        """A run begins, or goes on from its last checkpoint."""

    def step(self, record: Record) -> None:
        """A step is done."""

    def run_finished(self, config: TrainConfig, result: RunResult) -> None:
        """A run is done, now or in an earlier call."""


def compare(
    config: CompareConfig, out: Path, *, cache_dir: Path | None = None, monitor: Monitor | None = None
) -> dict[str, Any]:
    """Do every run that is not done yet, and write the report of all.

    Args:
        config: what to compare.
        out: the comparison's folder; new, or with a comparison of the same settings in it.
        cache_dir: where tokens are cached, :func:`spectrim.lab.tokens.default_cache_dir` unless given.
        monitor: told about progress.

    Returns:
        What ``results.json`` holds: "recipes" as in :func:`spectrim.lab.results.summarise`, "config" and "environment".

    Raises:
        LabError: the input cannot be served. ``out`` is then as it was.
    """
    from spectrim.lab.report import write_report

    config = canonical(config)
    runs = [(run, RunFolder(out / run.recipe / f"seed-{run.seed}")) for run in config.runs()]
    check(config, out, runs)
    tokens = prepare_tokens(config.data, cache_dir)
    for _, folder in runs:
        if (finished := folder.result()) is not None and finished.data_key != tokens.key:
            raise LabError(
                f"{str(folder.path)!r} was trained on other text than the data holds now; choose another --name"
            )
    write_text(out / "config.toml", config.to_toml())

    results: dict[str, list[RunResult]] = {recipe: [] for recipe in config.recipes}
    for run, folder in runs:
        result = folder.result()
        if result is None:
            if monitor:
                monitor.run_started(run)
            on_step = monitor.step if monitor else None
            result = train(run, folder.path, resume=True, cache_dir=cache_dir, on_step=on_step)
        if monitor:
            monitor.run_finished(run, result)
        results[run.recipe].append(result)
    summary = {
        "recipes": summarise(results),
        "config": config.model_dump(mode="json"),
        "environment": results[config.recipes[0]][0].environment,
    }
    write_report(summary, out)
    return summary


def canonical(config: CompareConfig) -> CompareConfig:
    """The configuration with recipe names in their canonical spelling and data as absolute paths.

    Raises:
        LabError: a recipe is unknown, stands twice under two spellings, or a rate belongs to none of the recipes.
    """
    spelling = {name: parse_recipe(name).name for name in config.recipes}
    update: dict[str, Any] = {"recipes": tuple(spelling.values())}
    if len(set(update["recipes"])) < len(spelling):
        raise LabError(f"recipes {', '.join(spelling)}: two of them are the same")
    for key in RATES:
        rates = {parse_recipe(name).name: value for name, value in getattr(config, key).items()}
        for name in rates:
            if name not in update["recipes"]:
                flag = "--" + key.replace("_", "-")
                raise LabError(f"{flag} {name}: not in this comparison, expected one of {', '.join(update['recipes'])}")
        update[key] = rates
    config = config.model_copy(update=update)
    return config.model_copy(update={"data": next(config.runs()).data})


def check(config: CompareConfig, out: Path, runs: list[tuple[TrainConfig, RunFolder]]) -> None:
    """Refuse to mix two comparisons in one folder. Writes nothing."""
    file = out / "config.toml"
    if out.exists() and not file.is_file() and (not out.is_dir() or any(out.iterdir())):
        raise LabError(f"{str(out)!r} exists and is no comparison; choose another --name")
    if not file.is_file():
        return
    stored = CompareConfig.parse(read_toml(file), source=f"config {str(file)!r}")
    for key in ("recipes", "seeds"):
        dropped = [value for value in getattr(stored, key) if value not in getattr(config, key)]
        if dropped:
            listed = ", ".join(map(str, dropped))
            raise LabError(f"comparison {str(out)!r} has {key} {listed} too; name them again, or choose another --name")
    # Recipes and seeds may grow; the rates are compared run by run, defaults included.
    free = {key: getattr(config, key) for key in ("recipes", "seeds", *RATES)}
    if changes := describe_differences(stored.model_copy(update=free), config):
        raise LabError(f"comparison {str(out)!r} has other settings: {changes}; choose another --name")
    for run, folder in runs:
        before = folder.stored_config()
        if before is not None and before != run:
            changes = describe_differences(before, run)
            raise LabError(f"run {str(folder.path)!r} has other settings: {changes}; choose another --name")
