"""``spectrim sweep``: flags in, a sweep's folder out. Mounted by :mod:`spectrim.lab.cli.app`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.lab.cli.flags import check_name, configure, parse_overrides, show, split_key, trust_named, with_settings
from spectrim.lab.errors import LabError

__all__ = ["sweep_command"]


def sweep_command(
    recipes: Annotated[
        list[str] | None, typer.Argument(metavar="[RECIPE]...", help="As for compare; may be added to later.")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the sweep, a folder in --runs-dir.")] = "sweep",
    runs_dir: Annotated[Path, typer.Option(help="Where sweeps and comparisons are kept.")] = Path("runs"),
    trials: Annotated[int | None, typer.Option(help="Trials of each recipe (default 12).")] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Try every point of a grid instead of searching.")] = False,
    space: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[RECIPE.]KEY=RANGE",
            help="LOW:HIGH, LOW:HIGH:linear or A,B,C of a key of the table optimizer, or of multiplier, which is "
            "embedding_lr and head_lr together; repeatable. Default: the learning rate and one or two more.",
        ),
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option(metavar="RECIPE.KEY=VALUE", help="A fixed value; repeatable.")
    ] = None,
    pruner: Annotated[str | None, typer.Option(help="median (default), hyperband or none.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Torch threads of each; default: evenly shared.")] = None,
    commands: Annotated[
        bool, typer.Option("--commands", help="Print one command line a trial for a queue, and run none.")
    ] = False,
    trial: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Do one trial of this recipe in an existing sweep.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of a trial.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of every trial, and of the search.")] = None,
    data: Annotated[list[str] | None, typer.Option("--data", help="Text file, folder or glob; repeatable.")] = None,
    preset: Annotated[str | None, typer.Option(help="Model preset.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences in a batch.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in a sequence.")] = None,
    vocabulary_size: Annotated[int | None, typer.Option(help="Tokens that the tokenizer learns.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, as for compare; repeatable."),
    ] = None,
    config_file: Annotated[Path | None, typer.Option("--config", help="TOML file with any of these settings.")] = None,
    trust_recipes: Annotated[
        bool, typer.Option("--trust-recipes", help="Import whatever module a file names as module:Class.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="auto (default: a GPU where there is one), cpu, cuda, cuda:N.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Train with torch.compile.")] = False,
    cache_dir: Annotated[Path | None, typer.Option(help="Where tokens are cached.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.")] = False,
) -> None:
    """Search each recipe's learning rate and own hyperparameters, every recipe with the same number of trials.

    Called again, it goes on: trials whose worker was stopped continue from their checkpoints. Then `spectrim compare
    --from-sweep` compares the winners.
    """
    from spectrim.lab.experiments.sweep import Sweep, open_sweep, say_on_stderr
    from spectrim.lab.experiments.sweep_results import write_sweep_report
    from spectrim.lab.experiments.sweep_settings import SweepConfig
    from spectrim.lab.reports.study import PAGE, report
    from spectrim.lab.reports.sweep_report import sweep_table

    check_name(name)
    out = runs_dir / name
    if trial is not None:
        trust_named({"recipe": trial}, trust_recipes)
        sweep = Sweep(out)
        sweep.compiled = compiled
        if not sweep.work(only=trial, limit=1, cache_dir=cache_dir, say=say_on_stderr):
            say_on_stderr(f"no trial of {trial} is left to begin")
        write_sweep_report(sweep)
        report([out], out / PAGE)
        return
    if config_file is None and (out / "config.toml").is_file():
        config_file = out / "config.toml"
    if not recipes and config_file is None:
        raise LabError("RECIPE is missing: name the recipes to search, such as adamw adamw+clip")
    flags = {
        "recipes": recipes or None,
        "trials": trials,
        "method": "grid" if grid else None,
        "pruner": pruner,
        "space": parse_spaces(space),
        "overrides": parse_overrides(override),
        "steps": steps,
        "seed": seed,
        "checkpoint_every": checkpoint_every,
        "device": device,
        "data.sources": data,
        "data.batch_size": batch_size,
        "data.sequence_length": sequence_length,
        "data.vocabulary_size": vocabulary_size,
        "model.preset": preset,
    }
    given = with_settings(flags, settings)
    trust_named(given, trust_recipes)
    sweep = open_sweep(configure(SweepConfig, config_file, given), out, cache_dir=cache_dir)
    sweep.compiled = compiled
    if commands:
        for line in command_lines(sweep, cache_dir):
            print(line)
        return
    try:
        if workers == 1:
            if threads is not None:
                import torch

                torch.set_num_threads(threads)
            sweep.work(cache_dir=cache_dir, say=say_on_stderr)
        else:
            sweep.run_workers(workers, threads=threads, cache_dir=cache_dir)
    finally:
        summary = write_sweep_report(sweep)
        ended = ("complete", "pruned", "diverged")
        if not any(entry[state] for entry in summary["recipes"].values() for state in ended):
            say_on_stderr("no trial has ended yet; those that have begun go on when the sweep is called again")
    report([out], out / PAGE)
    show(summary, as_json, lambda: sweep_table(summary))
    print(f"written to {out}: report.html, summary.md, results.json, learning_rates.svg", file=sys.stderr)
    left = {recipe: count for recipe in sweep.config.recipes if (count := sweep.remaining(recipe))}
    if left:
        missing = ", ".join(f"{count} of {recipe}" for recipe, count in left.items())
        raise LabError(f"trials not done: {missing}; call the sweep again to go on")


def command_lines(sweep: Any, cache_dir: Path | None) -> list[str]:
    """A command line for each trial that is not done, the recipes by turns; they run anywhere that sees the folder."""
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


def parse_spaces(items: list[str] | None) -> dict[str, dict[str, str]] | None:
    """[RECIPE.]KEY=RANGE by recipe; without a recipe it is for all of them."""
    from spectrim.lab.experiments.sweep_settings import ALL

    spaces: dict[str, dict[str, str]] = {}
    for item in items or []:
        left, equals, text = item.partition("=")
        if not equals or not left or not text:
            raise LabError(
                f"--space {item!r}: expected [RECIPE.]KEY=RANGE, such as lr=1e-4:1e-2 or spectra.momentum=0.9,0.95"
            )
        recipe, key = split_key(left)
        table = spaces.setdefault(recipe or ALL, {})
        if key in table:
            raise LabError(f"--space {item!r}: {left} stands twice")
        table[key] = text
    return spaces or None
