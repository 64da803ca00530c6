"""A comparison: recipes x seeds over the same text, batches and initial weights, each run in a folder of its own.

``runs/NAME/RECIPE/seed-S/`` is a run like any other. Calling a comparison again does only the missing runs: an
interrupted one is resumed, and a finished one only rewrites its report. Recipes and seeds may be added; other settings
need another name.

Runs have equal numbers of steps, or with ``equal="time"`` as many as fit into equal seconds. The report shows both the
final loss of a recipe and its loss at the time when AdamW ends.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from spectrim.lab.config import OptimizerConfig, SharedConfig, TrainConfig, without_paths
from spectrim.lab.data.tokens import prepare_tokens
from spectrim.lab.errors import LabError
from spectrim.lab.experiments.equal_time import fit_steps
from spectrim.lab.experiments.results import summarise
from spectrim.lab.experiments.settings import RATES, CompareConfig
from spectrim.lab.files import create_text, write_text
from spectrim.lab.logging.dynamics import read_dynamics
from spectrim.lab.logging.log import StepRecord, read_log
from spectrim.lab.logging.monitor_log import MonitorRecord
from spectrim.lab.logging.run_result import RunResult
from spectrim.lab.recipes.names import BASELINE, canonical_names, parse_recipe
from spectrim.lab.settings import describe_differences, merge
from spectrim.lab.training.folder import RunFolder, stored_settings
from spectrim.lab.training.run import prepare, train

__all__ = ["ComparisonListener", "compare"]


class ComparisonListener(Protocol):
    """Callbacks about the progress of a comparison."""

    def calibration_started(self, config: TrainConfig) -> None:
        """A recipe is about to be timed, for a comparison at equal time."""

    def run_started(self, config: TrainConfig) -> None:
        """A run begins, or resumes from its last checkpoint."""

    def step(self, record: StepRecord) -> None:
        """A step is done."""

    def measured(self, record: MonitorRecord) -> None:
        """The run's monitor has measured, or warns."""

    def run_finished(self, config: TrainConfig, result: RunResult) -> None:
        """A run is done, now or in an earlier call."""


def compare(
    config: CompareConfig,
    out: Path,
    *,
    cache_dir: Path | None = None,
    monitor: ComparisonListener | None = None,
    compiled: bool = False,
) -> dict[str, Any]:
    """Do every missing run, and write the report.

    Args:
        config: what to compare.
        out: the comparison's folder; new, or with a comparison of the same settings in it.
        cache_dir: where tokens are cached, :func:`spectrim.lab.data.tokens.default_cache_dir` unless given.
        monitor: told about progress.
        compiled: as for :func:`spectrim.lab.training.run.train`.

    Returns:
        What ``results.json`` holds: "recipes" as in :func:`spectrim.lab.experiments.results.summarise`, "config" and
        "environment".

    Raises:
        LabError: the input cannot be served. ``out`` is then as it was.
    """
    from spectrim.lab.reports.page.comparison_page import write_report
    from spectrim.lab.reports.study import PAGE, report

    config = canonical(config, out)
    check_folder(config, out)
    tokens = prepare_tokens(config.data, cache_dir)
    budget = None
    if config.equal == "time":
        # Recipes are timed in the comparison's folder, so claim it first.
        claim(config, out)
        firsts = list(runs_of(config.model_copy(update={"seeds": config.seeds[:1]})))
        on_calibration = monitor.calibration_started if monitor else None
        budget = fit_steps(
            firsts, out, seconds=config.seconds, cache_dir=cache_dir, on_calibration=on_calibration, compiled=compiled
        )
    steps = budget.steps if budget else None
    runs = [
        (run, RunFolder(out / parse_recipe(run.recipe).folder / f"seed-{run.seed}")) for run in runs_of(config, steps)
    ]
    check_runs(runs, tokens.key)
    claim(config, out)
    write_text(out / "config.toml", config.to_toml())

    results: dict[str, list[RunResult]] = {recipe: [] for recipe in config.recipes}
    for run, folder in runs:
        result = folder.result()
        if result is None:
            if monitor:
                monitor.run_started(run)
            on_step, on_measure = (monitor.step, monitor.measured) if monitor else (None, None)
            told: dict[str, Any] = {"on_step": on_step, "on_measure": on_measure}
            result = train(run, folder.path, resume=True, cache_dir=cache_dir, compiled=compiled, **told)
        if monitor:
            monitor.run_finished(run, result)
        results[run.recipe].append(with_dynamics(result, folder))
    summary = {
        "recipes": summarise(results),
        "config": config.model_dump(mode="json"),
        "environment": results[config.recipes[0]][0].environment,
        **({"budget": budget.model_dump(mode="json")} if budget else {}),
    }
    write_report(summary, out)
    report([out], out / PAGE)
    return summary


def runs_of(config: CompareConfig, steps: Mapping[str, int] | None = None) -> Iterator[TrainConfig]:
    """Yield every run with its hyperparameters filled in; all recipes with one seed come before the next seed.

    Args:
        config: the comparison.
        steps: the steps of each recipe, where they differ.
    """
    shared = {key: getattr(config, key) for key in SharedConfig.model_fields}
    for seed in config.seeds:
        for recipe in config.recipes:
            rates = {key: by[recipe] for key in RATES if recipe in (by := getattr(config, key))}
            values = merge(config.optimizer.model_dump(), config.overrides.get(recipe, {})) | rates
            shared["optimizer"] = OptimizerConfig.parse(values, source=f"overrides of {recipe!r}")
            if steps is not None:
                shared["steps"] = steps[recipe]
            yield prepare(TrainConfig(**shared, recipe=recipe, seed=seed))


def with_dynamics(result: RunResult, folder: RunFolder) -> RunResult:
    """Add the training dynamics from the run's log to its result, if the log still exists."""
    if result.dynamics is not None or not folder.log_file.is_file():
        return result
    return result.model_copy(update={"dynamics": read_dynamics(read_log(folder.log_file))})


def canonical(config: CompareConfig, out: Path) -> CompareConfig:
    """The configuration with recipe names in their canonical spelling; data, model and precision resolved.

    An open precision is taken from the comparison in ``out``, if there is one.

    Raises:
        LabError: a recipe is unknown or given twice, or a hyperparameter belongs to none of the recipes.
    """
    update: dict[str, Any] = {"recipes": canonical_names(config.recipes)}
    for key in (*RATES, "overrides"):
        rates = {parse_recipe(name).name: value for name, value in getattr(config, key).items()}
        for name in rates:
            if name not in update["recipes"]:
                flag = "--" + key.replace("_", "-").removesuffix("s")
                raise LabError(f"{flag} {name}: not in this comparison, expected one of {', '.join(update['recipes'])}")
        update[key] = rates
    if config.seconds is not None and config.equal != "time":
        raise LabError(f"seconds={config.seconds:g}: only a comparison at equal time has a time, see --equal")
    if config.equal == "time" and config.seconds is None and BASELINE not in update["recipes"]:
        raise LabError(f"equal time without {BASELINE!r} among the recipes: give the time with --seconds")
    config = config.model_copy(update=update)
    if config.precision == "auto" and (stored := stored_settings(CompareConfig, out)) is not None:
        config = config.model_copy(update={"precision": stored.precision})
    first, *_ = runs_of(config)  # all of them, so that each is checked
    return config.model_copy(update={key: getattr(first, key) for key in ("data", "model", "precision")})


def check_folder(config: CompareConfig, out: Path) -> None:
    """Refuse to mix two comparisons in one folder. Writes nothing."""
    stored = stored_settings(CompareConfig, out, kind="comparison")
    if stored is None:
        return
    for key in ("recipes", "seeds"):
        dropped = [value for value in getattr(stored, key) if value not in getattr(config, key)]
        if dropped:
            listed = ", ".join(map(str, dropped))
            raise LabError(f"comparison {str(out)!r} has {key} {listed} too; name them again, or choose another --name")
    # Recipes and seeds may be added; rates are compared run by run, defaults included.
    free = {key: getattr(config, key) for key in ("recipes", "seeds", "overrides", *RATES)}
    if changes := describe_differences(without_paths(stored.model_copy(update=free)), without_paths(config)):
        raise LabError(f"comparison {str(out)!r} has other settings: {changes}; choose another --name")


def claim(config: CompareConfig, out: Path) -> None:
    """Claim the folder for this comparison; safe if another process does so at the same time."""
    if not create_text(out / "config.toml", config.to_toml()):
        check_folder(config, out)


def check_runs(runs: list[tuple[TrainConfig, RunFolder]], data_key: str) -> None:
    """Refuse runs that were begun with other settings or on other text. Writes nothing."""
    for run, folder in runs:
        before = folder.stored_config()
        if before is not None and (changes := describe_differences(without_paths(before), without_paths(run))):
            raise LabError(f"run {str(folder.path)!r} has other settings: {changes}; choose another --name")
        if (finished := folder.result()) is not None and finished.data_key != data_key:
            raise LabError(
                f"{str(folder.path)!r} was trained on other text than the data holds now; choose another --name"
            )
