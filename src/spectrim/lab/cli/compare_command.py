"""``spectrim compare``: trains recipes on the same text, batches, seeds and initial weights."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.lab.cli import shared_options as shared
from spectrim.lab.cli.flags import configure, trust_named, with_settings
from spectrim.lab.errors import LabError
from spectrim.lab.experiments.settings import CompareConfig
from spectrim.lab.settings import merge

__all__ = ["compare_command"]


@with_settings(CompareConfig)
def compare_command(
    given: dict[str, Any],
    compiled: shared.Compile = False,
    name: shared.Name = "default",
    runs_dir: shared.RunsDir = Path("runs"),
    from_sweep: Annotated[
        Path | None,
        typer.Option(help="Folder of a sweep: compare its winners, with its settings.", rich_help_panel=shared.FILES),
    ] = None,
    config_file: shared.ConfigFile = None,
    trust_recipes: shared.TrustRecipes = False,
    show_config: shared.ShowConfig = False,
    cache_dir: shared.CacheDir = None,
    as_json: shared.Json = False,
) -> None:
    """Compare recipes on the same text, batches, seeds and initial weights.

    Without recipes: adamw, adamw+clip, spectra, muon. Called again, it skips finished runs and resumes interrupted
    ones.
    """
    from spectrim.lab.experiments.comparison import compare
    from spectrim.lab.logging.terminal import TerminalProgress
    from spectrim.lab.reports.comparison_report import terminal_tables

    if "seconds" in given:
        given.setdefault("equal", "time")
    winners = sweep_settings(from_sweep, config_file, given.get("recipes"))
    if winners is not None:
        given["overrides"] = merge(winners["overrides"], given.get("overrides", {}))
    trust_named(given, trust_recipes)
    config = configure(CompareConfig, config_file, given, below=winners)
    if show_config:
        print(config.to_toml(), end="")
        return
    shared.check_name(name)
    with TerminalProgress(runs=len(config.recipes) * len(config.seeds), steps=config.steps) as monitor:
        summary = compare(config, runs_dir / name, cache_dir=cache_dir, monitor=monitor, compiled=compiled)
    shared.show(summary, as_json, *terminal_tables(summary))
    print(
        f"written to {runs_dir / name}: report.html, summary.md, results.json, loss.svg, loss_over_time.svg",
        file=sys.stderr,
    )


def sweep_settings(folder: Path | None, file: Path | None, recipes: list[str] | None) -> dict[str, Any] | None:
    """The settings of a comparison of a sweep's winners."""
    if folder is None:
        return None
    if file is not None:
        raise LabError("--config and --from-sweep both say what to compare; give one of them")
    from spectrim.lab.experiments.sweep_results import settings_of_winners

    return settings_of_winners(folder, recipes)
