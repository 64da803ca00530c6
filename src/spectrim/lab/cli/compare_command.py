"""``spectrim compare``: trains recipes on the same text, batches, seeds and initial weights."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.lab.cli.flags import (
    check_name,
    configure,
    parse_overrides,
    parse_rates,
    parse_seeds,
    show,
    trust_named,
    with_settings,
)
from spectrim.lab.cli.shared_options import (
    RECIPES_HELP,
    Accumulate,
    BatchSize,
    CacheDir,
    CheckpointEvery,
    Compile,
    ConfigFile,
    Data,
    Device,
    GradientClip,
    Json,
    Model,
    Precision,
    Preset,
    RateOf,
    Schedule,
    SequenceLength,
    Settings,
    ShowConfig,
    Steps,
    TextColumn,
    TokenizerPath,
    TrustRecipes,
    VocabularySize,
    Weights,
    shared_flags,
)
from spectrim.lab.errors import LabError

__all__ = ["compare_command"]


def compare_command(
    recipes: Annotated[list[str] | None, typer.Argument(metavar="[RECIPE]...", help=RECIPES_HELP)] = None,
    name: Annotated[str, typer.Option(help="Name of the comparison, a folder in --runs-dir.")] = "default",
    runs_dir: Annotated[Path, typer.Option(help="Where comparisons are kept.")] = Path("runs"),
    steps: Steps = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, separated by commas.")] = None,
    data: Data = None,
    lr: RateOf = None,
    embedding_lr: RateOf = None,
    head_lr: RateOf = None,
    clip_bound: RateOf = None,
    text_column: TextColumn = None,
    tokenizer: TokenizerPath = None,
    override: Annotated[
        list[str] | None,
        typer.Option(metavar="RECIPE.KEY=VALUE", help="Any key of the table optimizer for one recipe; repeatable."),
    ] = None,
    equal: Annotated[
        str | None, typer.Option(help="tokens (default), or time: each recipe has as many steps as fit into it.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="With --equal time: how long; default: AdamW's time for --steps.")
    ] = None,
    preset: Preset = None,
    model: Model = None,
    weights: Weights = None,
    batch_size: BatchSize = None,
    sequence_length: SequenceLength = None,
    vocabulary_size: VocabularySize = None,
    checkpoint_every: CheckpointEvery = None,
    schedule: Schedule = None,
    accumulate: Accumulate = None,
    precision: Precision = None,
    device: Device = None,
    compiled: Compile = False,
    gradient_clip: GradientClip = None,
    settings: Settings = None,
    from_sweep: Annotated[
        Path | None, typer.Option(help="Folder of a sweep: its winners are compared, with its settings.")
    ] = None,
    config_file: ConfigFile = None,
    trust_recipes: TrustRecipes = False,
    show_config: ShowConfig = False,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Compare recipes on the same text, batches, seeds and initial weights.

    Without recipes: adamw, adamw+clip, spectra, muon. Finished runs are not repeated; an interrupted comparison goes
    on.
    """
    from spectrim.lab.config import merge
    from spectrim.lab.experiments.comparison import CompareConfig
    from spectrim.lab.experiments.comparison import compare as run_comparison
    from spectrim.lab.logging.terminal import TerminalProgress
    from spectrim.lab.reports.comparison_report import terminal_tables

    flags = {
        "recipes": recipes or None,
        "seeds": parse_seeds(seeds),
        "steps": steps,
        "checkpoint_every": checkpoint_every,
        "lr": parse_rates("--lr", lr),
        "embedding_lr": parse_rates("--embedding-lr", embedding_lr),
        "head_lr": parse_rates("--head-lr", head_lr),
        "clip_bound": parse_rates("--clip-bound", clip_bound),
        "overrides": parse_overrides(override),
        "equal": equal or ("time" if seconds is not None else None),
        "seconds": seconds,
        "data.sources": data,
        "data.text_column": text_column,
        "data.tokenizer": tokenizer,
        "data.batch_size": batch_size,
        "data.sequence_length": sequence_length,
        "data.vocabulary_size": vocabulary_size,
        "model.preset": preset,
        "model.architecture": model,
        "model.weights": weights,
        **shared_flags(schedule, accumulate, precision, device, gradient_clip),
    }
    winners = sweep_settings(from_sweep, config_file, recipes)
    if winners is not None:
        flags["overrides"] = merge(winners["overrides"], parse_overrides(override) or {})
    given = with_settings(flags, settings)
    trust_named(given, trust_recipes)
    config = configure(CompareConfig, config_file, given, below=winners)
    if show_config:
        print(config.to_toml(), end="")
        return
    check_name(name)
    with TerminalProgress(runs=len(config.recipes) * len(config.seeds), steps=config.steps) as monitor:
        summary = run_comparison(config, runs_dir / name, cache_dir=cache_dir, monitor=monitor, compiled=compiled)
    show(summary, as_json, lambda: terminal_tables(summary))
    print(
        f"written to {runs_dir / name}: report.html, summary.md, results.json, loss.svg, loss_over_time.svg",
        file=sys.stderr,
    )


def sweep_settings(folder: Path | None, file: Path | None, recipes: list[str] | None) -> dict[str, Any] | None:
    """What a comparison of a sweep's winners starts from."""
    if folder is None:
        return None
    if file is not None:
        raise LabError("--config and --from-sweep both say what to compare; give one of them")
    from spectrim.lab.experiments.sweep_results import settings_of_winners

    return settings_of_winners(folder, recipes)
