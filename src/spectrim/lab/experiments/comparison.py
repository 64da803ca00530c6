"""A comparison: recipes x seeds over the same text, batches and initial weights, each run in a folder of its own.

``runs/NAME/RECIPE/seed-S/`` is a run like any other. A second call does only the missing runs: it resumes an
interrupted comparison, and rewrites the report of a finished one. Recipes and seeds may be added; other settings need
another name.

Runs have equal numbers of steps, or with ``equal="time"`` as many as fit into equal seconds. The report shows both the
final loss of a recipe and its loss at the time when AdamW ends.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from spectrim.lab.config import TrainConfig
from spectrim.lab.data.tokens import prepare_tokens
from spectrim.lab.errors import LabError
from spectrim.lab.experiments.equal_time import fit_steps
from spectrim.lab.experiments.results import summarise
from spectrim.lab.experiments.runs import by_canonical_name, check_same_settings, check_same_text, run_of
from spectrim.lab.experiments.settings import RATES, CompareConfig
from spectrim.lab.files import create_text, write_text
from spectrim.lab.logging.dynamics import read_dynamics
from spectrim.lab.logging.log import StepRecord, read_log
from spectrim.lab.logging.monitor_log import MonitorRecord
from spectrim.lab.logging.run_result import RunResult
from spectrim.lab.recipes.names import BASELINE, canonical_names, parse_recipe
from spectrim.lab.training.folder import RunFolder, stored_settings
from spectrim.lab.training.run import train

__all__ = ["ComparisonListener", "compare"]


class ComparisonListener(Protocol):
    """Receives the progress of a comparison."""

    def calibration_started(self, config: TrainConfig) -> None:
        """Called before a recipe is timed, in a comparison at equal time."""

    def run_started(self, config: TrainConfig) -> None:
        """Called before a run begins or resumes."""

    def step(self, record: StepRecord) -> None:
        """Called after every step."""

    def measured(self, record: MonitorRecord) -> None:
        """Called after every measurement and warning of the run's monitor."""

    def run_finished(self, config: TrainConfig, result: RunResult) -> None:
        """Called after every run, also one of an earlier call."""


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
        out: the comparison's folder; new, or that of a comparison with the same settings.
        cache_dir: where tokens are cached; :func:`spectrim.lab.data.tokens.default_cache_dir` by default.
        monitor: receives progress.
        compiled: as for :func:`spectrim.lab.training.run.train`.

    Returns:
        The content of ``results.json``: "recipes" from :func:`spectrim.lab.experiments.results.summarise`, "config"
        and "environment".

    Raises:
        LabError: the input is wrong. ``out`` is then unchanged.
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
            listeners: dict[str, Any] = {"on_step": on_step, "on_measure": on_measure}
            result = train(run, folder.path, resume=True, cache_dir=cache_dir, compiled=compiled, **listeners)
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
    """Yield every run with its hyperparameters filled in, all recipes of one seed before the next seed; ``steps`` are
    those of each recipe, if they differ.
    """
    for seed in config.seeds:
        for recipe in config.recipes:
            rates = {key: by[recipe] for key in RATES if recipe in (by := getattr(config, key))}
            own, more = config.overrides.get(recipe, {}), {"steps": steps[recipe]} if steps is not None else {}
            yield run_of(config, recipe, seed, own, rates, source=f"overrides of {recipe!r}", **more)


def with_dynamics(result: RunResult, folder: RunFolder) -> RunResult:
    """Add the training dynamics from the run's log to its result, if the log still exists."""
    if result.dynamics is not None or not folder.log_file.is_file():
        return result
    return result.model_copy(update={"dynamics": read_dynamics(read_log(folder.log_file))})


def canonical(config: CompareConfig, out: Path) -> CompareConfig:
    """The configuration with canonical recipe names, and data, model and precision resolved.

    A comparison in ``out`` keeps its precision if the new one is "auto".

    Raises:
        LabError: a recipe is unknown or given twice, or a hyperparameter belongs to none of the recipes.
    """
    update: dict[str, Any] = {"recipes": canonical_names(config.recipes)}
    for key in (*RATES, "overrides"):
        update[key] = by_canonical_name(getattr(config, key), key, update["recipes"], "comparison")
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
    check_same_settings("comparison", out, stored.model_copy(update=free), config)


def claim(config: CompareConfig, out: Path) -> None:
    """Reserve the folder for this comparison; safe if another process does so at the same time."""
    if not create_text(out / "config.toml", config.to_toml()):
        check_folder(config, out)


def check_runs(runs: list[tuple[TrainConfig, RunFolder]], data_key: str) -> None:
    """Refuse runs that were begun with other settings or on other text. Writes nothing."""
    for run, folder in runs:
        if (before := folder.stored_config()) is not None:
            check_same_settings("run", folder.path, before, run)
        check_same_text(folder, data_key)
