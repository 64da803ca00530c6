"""The commands, each with its flags; whatever is slow to import is imported only once it is needed."""

import importlib
import importlib.util
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.lab.errors import LabError, LabWarning
from spectrim.lab.flags import (
    check_name,
    configure,
    parse_overrides,
    parse_rates,
    parse_seeds,
    show,
    trust_named,
    with_settings,
)
from spectrim.lab.plan import plan_command
from spectrim.lab.report_cli import report_command
from spectrim.lab.spectrum_cli import spectrum_command
from spectrim.lab.sweep_cli import sweep_command

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Spectral control of LLM training: compare optimizer recipes on your own text.",
)

RECIPES_HELP = (
    "base[+shrink][+preclip][+clip], for example adamw, adamw+clip, spectra, muon; or module:Class[+clip] for any "
    "optimizer, such as torch.optim:NAdam."
)

Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="SOURCE[@WEIGHT]",
        help="Text, jsonl or parquet (file, folder, glob), token shards, hub:OWNER/NAME; repeatable. "
        "Default: State of the Union addresses.",
    ),
]
TextColumn = Annotated[str | None, typer.Option(help="Column of jsonl, parquet and data sets that holds the text.")]
TokenizerPath = Annotated[
    str | None, typer.Option("--tokenizer", help="tokenizer.json or Hugging Face folder; default: one is learned.")
]
Model = Annotated[
    str | None,
    typer.Option("--model", help="Causal LM of transformers: a type such as gpt2, or a config.json, TOML or folder."),
]
Weights = Annotated[str | None, typer.Option(help="Hugging Face folder of weights to continue from.")]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps of a run.")]
Preset = Annotated[str | None, typer.Option(help="Model size: tiny, 1m, 2m, 10m, 25m, 90m, 200m, 400m, 1b.")]
BatchSize = Annotated[int | None, typer.Option(help="Sequences in a batch.")]
SequenceLength = Annotated[int | None, typer.Option(help="Tokens in a sequence.")]
VocabularySize = Annotated[int | None, typer.Option(help="Tokens that the tokenizer learns.")]
CheckpointEvery = Annotated[int | None, typer.Option(help="Steps between checkpoints.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file, such as the config.toml of a run.")]
CacheDir = Annotated[Path | None, typer.Option(help="Where tokens are cached.")]
Schedule = Annotated[str | None, typer.Option(help="Learning rate after the warm-up: cosine, wsd or constant.")]
Accumulate = Annotated[int | None, typer.Option(help="Micro-batches that a batch is split into, to save memory.")]
Precision = Annotated[
    str | None,
    typer.Option(help="float32, bf16 (autocast to bfloat16), or auto: bf16 on a GPU that has it. Default: auto."),
]
Device = Annotated[
    str | None, typer.Option(help="auto (a GPU where there is one), cpu, cuda or cuda:N. Default: auto.")
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Train with torch.compile. A run may be resumed with it or without.")
]
GradientClip = Annotated[str | None, typer.Option(help="Global L2 norm of the gradient; none turns the clip off.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any setting of config.toml, its value as in TOML, such as schedule.decay_fraction=0.3; repeatable. "
        "--show-config lists them.",
    ),
]
TrustRecipes = Annotated[
    bool,
    typer.Option(
        "--trust-recipes",
        help="Import whatever module a file names as module:Class; else only those named on this command line.",
    ),
]
ShowConfig = Annotated[bool, typer.Option("--show-config", help="Print every setting as TOML, and stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.")]
RateOf = Annotated[list[str] | None, typer.Option(metavar="RECIPE=VALUE", help="Repeatable.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """Options of no command in particular."""
    if version:
        import spectrim

        print(spectrim.__version__)
        raise typer.Exit


@app.command()
def compare(
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
    from spectrim.lab.compare import CompareConfig
    from spectrim.lab.compare import compare as run_comparison
    from spectrim.lab.config import merge
    from spectrim.lab.progress import TerminalMonitor
    from spectrim.lab.report import terminal_tables

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
    with TerminalMonitor(runs=len(config.recipes) * len(config.seeds), steps=config.steps) as monitor:
        summary = run_comparison(config, runs_dir / name, cache_dir=cache_dir, monitor=monitor, compiled=compiled)
    show(summary, as_json, lambda: terminal_tables(summary))
    print(
        f"written to {runs_dir / name}: report.html, summary.md, results.json, loss.svg, loss_over_time.svg",
        file=sys.stderr,
    )


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(help=RECIPES_HELP)] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; new or empty unless --resume.")] = None,
    steps: Steps = None,
    seed: Annotated[int | None, typer.Option(help="Decides initial weights and batches.")] = None,
    data: Data = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; default: the recipe's own.")] = None,
    embedding_lr: Annotated[float | None, typer.Option(help="Factor on it for embeddings.")] = None,
    head_lr: Annotated[float | None, typer.Option(help="Factor on it for the output head.")] = None,
    clip_bound: Annotated[
        float | None, typer.Option(help="Of recipes with +clip: threshold times peak learning rate.")
    ] = None,
    text_column: TextColumn = None,
    tokenizer: TokenizerPath = None,
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
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    parallel: Annotated[
        str | None,
        typer.Option(help="Under torchrun, how the model is spread: fsdp (default), ddp, hsdp or tp."),
    ] = None,
    config_file: ConfigFile = None,
    trust_recipes: TrustRecipes = False,
    show_config: ShowConfig = False,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Train one model with one recipe; --resume continues bit for bit.

    On several processes: torchrun --nproc-per-node N -m spectrim train ... The batch is that of all together.
    """
    from spectrim.lab.config import TrainConfig
    from spectrim.lab.parallel import open_parallel
    from spectrim.lab.progress import TerminalMonitor
    from spectrim.lab.run import RunFolder
    from spectrim.lab.train import prepare
    from spectrim.lab.train import train as run_training

    if out is None and not show_config:
        raise LabError("--out is missing: name the folder that the run is to be written to")
    flags = {
        "recipe": recipe,
        "seed": seed,
        "steps": steps,
        "checkpoint_every": checkpoint_every,
        "optimizer.lr": lr,
        "optimizer.embedding_lr": embedding_lr,
        "optimizer.head_lr": head_lr,
        "optimizer.clip_bound": clip_bound,
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
    if resume and config_file is None and out is not None and RunFolder(out).config_file.is_file():
        config_file = RunFolder(out).config_file
    if recipe is None and config_file is None:
        raise LabError(f"RECIPE is missing: {RECIPES_HELP}")
    given = with_settings(flags, settings)
    trust_named(given, trust_recipes)
    config = prepare(configure(TrainConfig, config_file, given))
    if out is None or show_config:
        print(config.to_toml(), end="")
        return
    with open_parallel(parallel) as processes:
        how: dict[str, Any] = {"resume": resume, "cache_dir": cache_dir, "parallel": processes, "compiled": compiled}
        train_here = partial(run_training, config, out, **how)
        if not processes.is_first:
            train_here()
            return
        with TerminalMonitor(runs=1, steps=config.steps) as monitor:
            monitor.run_started(config)
            result = train_here(on_step=monitor.step, on_measure=monitor.measured)
            monitor.run_finished(config, result)
    if as_json:
        show(result.model_dump(mode="json"), True, str)
    skipped = result.dynamics.skipped if result.dynamics else 0
    measured = ", monitor.jsonl" if RunFolder(out).monitor_file.is_file() else ""
    print(f"written to {out}: model/, log.jsonl{measured}, config.toml, result.json", file=sys.stderr)
    if skipped == config.steps:
        raise LabError(f"no gradient of the {skipped} steps in {out} was finite, so the model in it is as it began")
    if skipped:
        message = f"{skipped} of {config.steps} steps in {out} had a gradient that was not finite: nothing moved then"
        warnings.warn(message, LabWarning, stacklevel=1)


@app.command()
def corpus(
    data: Data = None,
    text_column: TextColumn = None,
    tokenizer: TokenizerPath = None,
    vocabulary_size: VocabularySize = None,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Show what a corpus holds: documents, bytes and tokens of both sides of the split, and a sample."""
    from spectrim.lab.config import DataConfig
    from spectrim.lab.tokens import describe_tokens, prepare_tokens, resolve_data

    flags = {"sources": data, "text_column": text_column, "tokenizer": tokenizer, "vocabulary_size": vocabulary_size}
    config = configure(DataConfig, None, flags)
    description = describe_tokens(prepare_tokens(resolve_data(config), cache_dir))
    show(description, as_json, lambda: corpus_table(description))


app.command("plan")(plan_command)
app.command("sweep")(sweep_command)
app.command("report")(report_command)
app.command("spectrum")(spectrum_command)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    hidden=importlib.util.find_spec("spectrim.lab.bench_cli") is None,
)
def bench(context: typer.Context) -> None:
    """Measure the speed of operators and optimizers."""
    bench_app = importlib.import_module("spectrim.lab.bench_cli").bench_app  # late, for it needs torch
    raise typer.Exit(bench_app(context.args, prog_name="spectrim bench", standalone_mode=False) or 0)


def sweep_settings(folder: Path | None, file: Path | None, recipes: list[str] | None) -> dict[str, Any] | None:
    """What a comparison of a sweep's winners starts from."""
    if folder is None:
        return None
    if file is not None:
        raise LabError("--config and --from-sweep both say what to compare; give one of them")
    from spectrim.lab.sweep_report import settings_of_winners

    return settings_of_winners(folder, recipes)


def shared_flags(
    schedule: str | None, accumulate: int | None, precision: str | None, device: str | None, gradient_clip: str | None
) -> dict[str, Any]:
    """Flags of both training commands, by the key of their setting."""
    return {
        "schedule.shape": schedule,
        "accumulate": accumulate,
        "precision": precision,
        "device": device,
        "optimizer.gradient_clip": gradient_clip,
    }


def corpus_table(description: dict[str, Any]) -> Any:
    """Both sides of the split, of each weighted source if there are such, and the sample."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table("side", "documents", "bytes", "tokens", "bytes per token")
    parts = [
        ("", description),
        *((f"{part['source']}@{part['weight']:g}: ", part) for part in description.get("sources", [])),
    ]
    for name, part in parts:
        for side in ("train", "validation"):
            counts = part[side]
            cells = ["?" if counts[key] is None else f"{counts[key]:,}" for key in ("documents", "bytes", "tokens")]
            ratio = "?" if counts["bytes"] is None else f"{counts['bytes'] / counts['tokens']:.2f}"
            table.add_row(Text(name + side), *cells, ratio)
    sample = Text(f"\n{description['sample']} ...")
    return Group(table, Text(f"vocabulary: {description['vocabulary_size']:,} tokens"), sample)
