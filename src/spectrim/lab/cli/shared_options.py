"""Options that several commands have in common, and what they mean as settings."""

from pathlib import Path
from typing import Annotated, Any

import typer

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
