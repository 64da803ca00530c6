"""``spectrim sweep``: searches each recipe's hyperparameters."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectrim.lab.cli import shared_options as shared
from spectrim.lab.cli.flags import THEMES, configure, trust_named, with_settings
from spectrim.lab.errors import LabError
from spectrim.lab.experiments.settings import RATES, SweepConfig

if TYPE_CHECKING:
    from spectrim.lab.experiments.sweep import Sweep

__all__ = ["sweep_command"]

WORKERS = "Workers"


# Learning rates are what a sweep searches, so they are not flags: --space gives their ranges, --override fixes them.
@with_settings(SweepConfig, THEMES | {"Optimizer": [key for key in THEMES["Optimizer"] if not key.endswith(RATES)]})
def sweep_command(
    given: dict[str, Any],
    grid: Annotated[
        bool,
        typer.Option("--grid", help="Try every point of a grid instead of searching.", rich_help_panel="Experiment"),
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes on this machine.", rich_help_panel=WORKERS)] = 1,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="Torch threads of each. [dim]\\[default: evenly shared][/dim]", rich_help_panel=WORKERS
        ),
    ] = None,
    commands: Annotated[
        bool,
        typer.Option(
            "--commands", help="Print one command line a trial for a queue, and run none.", rich_help_panel=WORKERS
        ),
    ] = False,
    trial: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE", help="Do one trial of this recipe in an existing sweep.", rich_help_panel=WORKERS
        ),
    ] = None,
    compiled: shared.Compile = False,
    name: shared.Name = "sweep",
    runs_dir: shared.RunsDir = Path("runs"),
    config_file: shared.ConfigFile = None,
    trust_recipes: shared.TrustRecipes = False,
    cache_dir: shared.CacheDir = None,
    as_json: shared.Json = False,
) -> None:
    """Search each recipe's learning rate and own hyperparameters, every recipe with the same number of trials.

    Called again, it resumes: interrupted trials continue from their checkpoints. Then `spectrim compare --from-sweep`
    compares the winners.
    """
    from spectrim.lab.experiments.sweep import open_sweep

    shared.check_name(name)
    out = runs_dir / name
    if trial is not None:
        trust_named({"recipe": trial}, trust_recipes)
        do_one_trial(out, trial, compiled=compiled, cache_dir=cache_dir)
        return
    if config_file is None and (out / "config.toml").is_file():
        config_file = out / "config.toml"
    if "recipes" not in given and config_file is None:
        raise LabError("RECIPE is missing: name the recipes to search, such as adamw adamw+clip")
    if grid:
        given["method"] = "grid"
    trust_named(given, trust_recipes)
    sweep = open_sweep(configure(SweepConfig, config_file, given), out, cache_dir=cache_dir)
    sweep.compiled = compiled
    if commands:
        for line in command_lines(sweep, cache_dir):
            print(line)
        return
    do_all_trials(sweep, workers, threads=threads, cache_dir=cache_dir, as_json=as_json)


def do_one_trial(out: Path, recipe: str, *, compiled: bool, cache_dir: Path | None) -> None:
    """Do one trial of an existing sweep, and write the sweep's report again."""
    from spectrim.lab.experiments.sweep import Sweep
    from spectrim.lab.experiments.sweep_results import write_sweep_report
    from spectrim.lab.experiments.sweep_workers import say_on_stderr
    from spectrim.lab.reports.study import PAGE, report

    sweep = Sweep(out)
    sweep.compiled = compiled
    if not sweep.work(only=recipe, limit=1, cache_dir=cache_dir, say=say_on_stderr):
        say_on_stderr(f"no trial of {recipe} is left to begin")
    write_sweep_report(sweep)
    report([out], out / PAGE)


def do_all_trials(sweep: "Sweep", workers: int, *, threads: int | None, cache_dir: Path | None, as_json: bool) -> None:
    """Do what is left of a sweep, write its report and print its table."""
    from spectrim.lab.experiments.sweep_results import write_sweep_report
    from spectrim.lab.experiments.sweep_workers import run_workers, say_on_stderr
    from spectrim.lab.reports.study import PAGE, report
    from spectrim.lab.reports.sweep_report import sweep_table

    try:
        if workers == 1:
            if threads is not None:
                import torch

                torch.set_num_threads(threads)
            sweep.work(cache_dir=cache_dir, say=say_on_stderr)
        else:
            run_workers(sweep, workers, threads=threads, cache_dir=cache_dir)
    finally:
        summary = write_sweep_report(sweep)
        ended = ("complete", "pruned", "diverged")
        if not any(entry[state] for entry in summary["recipes"].values() for state in ended):
            say_on_stderr("no trial has ended yet; those that have begun go on when the sweep is called again")
    report([sweep.out], sweep.out / PAGE)
    shared.show(summary, as_json, sweep_table(summary))
    print(f"written to {sweep.out}: report.html, summary.md, results.json, learning_rates.svg", file=sys.stderr)
    left = {recipe: count for recipe in sweep.config.recipes if (count := sweep.remaining(recipe))}
    if left:
        missing = ", ".join(f"{count} of {recipe}" for recipe, count in left.items())
        raise LabError(f"trials not done: {missing}; call the sweep again to go on")


def command_lines(sweep: "Sweep", cache_dir: Path | None) -> list[str]:
    """A command line for each unfinished trial, recipe by recipe in turn, for any machine that shares the folder."""
    out = sweep.out.resolve()
    left = {recipe: sweep.remaining(recipe) for recipe in sweep.config.recipes}
    more = [] if cache_dir is None else ["--cache-dir", str(cache_dir.resolve())]
    more += ["--compile"] if sweep.compiled else []
    lines = []
    for turn in range(max(left.values())):
        for recipe, count in left.items():
            if turn < count:
                words = ["spectrim", "sweep", "--runs-dir", str(out.parent), "--name", out.name, "--trial", recipe]
                lines.append(shlex.join([*words, *more]))
    return lines
