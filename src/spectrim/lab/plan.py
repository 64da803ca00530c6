"""``spectrim plan``: what a recipe would do to a model, before anything is allocated or trained.

Either to every parameter, as :func:`spectrim.describe` shows it, or, given a number of ranks, what recipes would cost
on them by the arithmetic of :mod:`spectrim.lab.scaling`. The model is built on the meta device, so that a model of any
size is planned in seconds. torch and transformers are imported only once they are needed.
"""

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from spectrim.lab.errors import LabError
from spectrim.lab.flags import trust_named
from spectrim.lab.published import PUBLISHED
from spectrim.lab.scaling import (
    PARALLEL,
    Cluster,
    Hardware,
    Parallel,
    Projection,
    active_parameters,
    project,
    read_work,
)

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from torch import nn

    from spectrim.optim.describe import Description

__all__ = ["SCALING_RECIPES", "plan", "plan_command", "plan_scaling"]

AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForImageTextToText",
    "AutoModelForImageClassification",
    "AutoModel",
)
"""Where a configuration names no architecture: the first that knows it."""

DEFAULT_RECIPE = "adamw+clip"

SCALING_RECIPES = ("adamw", "adamw+shrink", "adamw+clip", "signum+clip", "ademamix+clip", "spectra", "muon")
"""What a projection compares unless one recipe is named."""

DEFAULT_HARDWARE = Hardware(flops=4e14, bandwidth=5e10, tokens=8192)
"""About what an H100 achieves in bfloat16 training, 400 Gbit/s for every rank, and one Llama 3 sequence."""

DEFAULT_SHARD = 8
"""Ranks that share one copy with hsdp: those of a usual machine."""


def plan(model: str, recipe: str, *, lr: float | None = None) -> "Description":
    """What a recipe does to every parameter of a model, without allocating a weight.

    Args:
        model: a preset of the lab, a model type of transformers in its default size, or a configuration of
            transformers: a ``config.json`` or a folder that holds one; or a published shape of :data:`PUBLISHED`.
        recipe: base[+shrink][+preclip][+clip].
        lr: peak learning rate; by default the recipe's own.

    Raises:
        LabError: model or recipe is unknown, or a parameter's role cannot be told.
    """
    from spectrim.optim.describe import describe

    return describe(optimizer_on_meta(build_on_meta(model), model, recipe, lr=lr))


def plan_scaling(
    model: str, recipes: Sequence[str], cluster: Cluster, hardware: Hardware
) -> tuple[float, list[Projection]]:
    """What recipes would cost on many ranks: the parameters that a token meets, and one projection for each recipe.

    Args:
        model: as for :func:`plan`.
        recipes: of this library; what an optimizer from outside sends is not known.
        cluster: the ranks, and how parameters lie on them.
        hardware: what a step of training is set against.

    Raises:
        LabError: model or recipe is unknown, or a parameter's role cannot be told.
    """
    from spectrim.optim.optimizer import SpectralOptimizer

    built = build_on_meta(model)
    projections, active = [], 0.0
    for recipe in recipes:
        optimizer = optimizer_on_meta(built, model, recipe)
        if not isinstance(optimizer, SpectralOptimizer):
            raise LabError(f"recipe {recipe!r}: what {type(optimizer).__name__} costs on many ranks is not known here")
        work = read_work(optimizer)
        active = active_parameters(built, work)
        projections.append(project(recipe, work, cluster, hardware, active=active))
    return active, projections


def plan_command(
    model: Annotated[
        str,
        typer.Option(
            help="Preset of the lab, model type of transformers, config.json or a folder with one, or a published "
            f"shape: {', '.join(PUBLISHED)}."
        ),
    ] = "2m",
    recipe: Annotated[
        str | None,
        typer.Option(
            help="base[+shrink][+preclip][+clip], for example adamw, adamw+clip, spectra, muon; default: "
            f"{DEFAULT_RECIPE}, or with --world a choice of them."
        ),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; default: the recipe's own.")] = None,
    world: Annotated[
        int | None, typer.Option(help="Number of ranks: project what a step costs on them, by arithmetic on shapes.")
    ] = None,
    parallel: Annotated[
        str | None, typer.Option(help=f"With --world, how parameters lie: {', '.join(PARALLEL)}. Default: fsdp.")
    ] = None,
    shard: Annotated[
        int | None, typer.Option(help=f"With hsdp, ranks that share one copy; default: {DEFAULT_SHARD}.")
    ] = None,
    flops: Annotated[
        float | None,
        typer.Option(
            help=f"With --world, operations a rank achieves in a second; default: {DEFAULT_HARDWARE.flops:g}."
        ),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(help=f"With --world, bytes a rank sends in a second; default: {DEFAULT_HARDWARE.bandwidth:g}."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help=f"With --world, tokens of a rank in a step; default: {DEFAULT_HARDWARE.tokens}.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.")] = False,
) -> None:
    """Show what a recipe would do to every parameter of a model, or what recipes would cost on many ranks.

    No weights are built. With --world: operations, bytes sent and bytes of state for every rank, and the share of a
    step of training that the optimizer would take. That is arithmetic and no measurement; docs/scaling.md derives it.
    """
    trust_named({"recipe": recipe}, everything=False)
    given = {"--parallel": parallel, "--shard": shard, "--flops": flops, "--bandwidth": bandwidth, "--tokens": tokens}
    if world is None:
        for flag, value in given.items():
            if value is not None:
                raise LabError(f"{flag} {value}: only a projection has it, give the number of ranks by --world")
        description = plan(model, recipe or DEFAULT_RECIPE, lr=lr)
        if as_json:
            head: dict[str, Any] = {"model": model, "recipe": recipe or DEFAULT_RECIPE}
            print(json.dumps({**head, **description.to_dict()}, indent=2, ensure_ascii=False))
        else:
            print_table(plan_table(description))
        return
    if lr is not None:
        raise LabError(f"--lr {lr}: it changes nothing in what a step costs, leave it out with --world")
    parallel = parallel or "fsdp"
    if parallel == "hsdp" and shard is None:
        shard = DEFAULT_SHARD
    cluster = Cluster(world=world, parallel=cast("Parallel", parallel), shard=shard)
    chosen: dict[str, Any] = {"flops": flops, "bandwidth": bandwidth, "tokens": tokens}
    hardware = replace(DEFAULT_HARDWARE, **{key: value for key, value in chosen.items() if value is not None})
    active, projections = plan_scaling(model, [recipe] if recipe else SCALING_RECIPES, cluster, hardware)
    if as_json:
        head = {"model": model, "active_parameters": active, **asdict(cluster), **asdict(hardware)}
        print(json.dumps({**head, "recipes": [asdict(projection) for projection in projections]}, indent=2))
    else:
        print_table(scaling_table(model, active, projections, cluster, hardware))


def print_table(table: "Table") -> None:
    """Print a table; where there is no terminal, with every row on one line."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        # A file or a pipe has no width: give every row its line.
        console = Console(width=console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)


def scaling_table(
    model: str, active: float, projections: Sequence[Projection], cluster: Cluster, hardware: Hardware
) -> "Table":
    """One row for each recipe, with what was assumed below."""
    from rich.table import Table
    from rich.text import Text

    layout = cluster.parallel if cluster.shard is None else f"{cluster.parallel} over {cluster.shard}"
    caption = (
        f"{model}, {cluster.world:,} ranks, {layout}. Means over ranks, and in brackets the rank that has most; "
        f"share: its share of a step of {hardware.tokens:,} tokens a rank and 6 operations for each of {active:.3g} "
        f"parameters, at {hardware.flops:g} operations and {hardware.bandwidth:g} bytes a second. Arithmetic, not a "
        f"measurement. Gathered: the same with every matrix gathered whole on every rank."
    )
    rows = scaling_rows(projections)
    table = Table(caption=Text(caption), caption_justify="left")
    for title in rows[0]:
        table.add_column(title, justify="left" if title == "recipe" else "right")
    for row in rows:
        table.add_row(*map(Text, row.values()))
    return table


def scaling_rows(projections: Sequence[Projection]) -> list[dict[str, str]]:
    """The cells of a table of projections."""
    return [
        {
            "recipe": projection.recipe,
            "GFLOP": with_most(projection.cost.flops / 1e9, projection.cost.busiest_flops / 1e9),
            "MB sent": with_most(projection.cost.bytes_sent / 1e6, projection.cost.busiest_bytes_sent / 1e6),
            "state MB": with_most(projection.cost.state_bytes / 1e6, projection.cost.largest_state_bytes / 1e6),
            "share": f"{projection.share:.2%}",
            "gathered GFLOP": number(projection.gathered.flops / 1e9),
            "gathered MB sent": number(projection.gathered.bytes_sent / 1e6),
            "gathered share": f"{projection.gathered_share:.2%}",
        }
        for projection in projections
    ]


def with_most(mean: float, most: float) -> str:
    """A mean, and in brackets the largest where that differs to the eye."""
    return number(mean) if number(mean) == number(most) else f"{number(mean)} ({number(most)})"


def number(value: float) -> str:
    """Three digits or all before the point, with commas."""
    return f"{value:,.0f}" if value >= 100 or value == 0 else f"{value:.3g}"


def plan_table(description: "Description") -> "Table":
    """The rows of a description, with the totals below."""
    from rich.table import Table
    from rich.text import Text

    header, *rows = description.cells()
    table = Table(caption=Text(description.summary()), caption_justify="left")
    for title in header:
        table.add_column(title, justify="right" if title in ("lr", "decay", "state bytes") else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def optimizer_on_meta(
    built: "nn.Module", model: str, recipe: str, *, lr: float | None = None
) -> "torch.optim.Optimizer":
    """The recipe's optimizer over a model on the meta device; the model's name is for messages."""
    from spectrim.lab.config import TrainConfig
    from spectrim.lab.recipes import build_optimizer, resolve

    config = resolve(TrainConfig.parse({"recipe": recipe, "optimizer": {"lr": lr}}, source="options"))
    try:
        return build_optimizer(built, config)
    except ValueError as error:
        raise LabError(f"model {model!r}, recipe {recipe!r}: {error}") from None


def build_on_meta(model: str) -> "nn.Module":
    """The model that a preset, a published shape, a model type or a configuration names, on the meta device."""
    import torch

    from spectrim.lab.config import DEFAULT_VOCABULARY_SIZE, DataConfig
    from spectrim.lab.model import PRESETS, build_model

    with torch.device("meta"):
        if model in PRESETS:
            length = DataConfig().sequence_length
            return build_model(model, vocabulary_size=DEFAULT_VOCABULARY_SIZE, sequence_length=length, seed=0)
        return from_configuration(model, read_configuration(model))


def read_configuration(model: str) -> Any:
    """The configuration of transformers that a path, a published shape or a model type names."""
    from spectrim.lab.model import PRESETS, quiet_transformers

    transformers = quiet_transformers()
    path = Path(model)
    if path.exists():
        try:
            return transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise LabError(f"model {model!r} is not a configuration of transformers: {first_line(error)}") from None
    if model in PUBLISHED:
        shape = PUBLISHED[model]
        return transformers.CONFIG_MAPPING[shape.model_type](**shape.settings, architectures=[shape.architecture])
    types = list(transformers.CONFIG_MAPPING)
    if model not in types:
        close = difflib.get_close_matches(model, [*PRESETS, *PUBLISHED, *types], n=3)
        hint = f"; close to it: {', '.join(close)}" if close else ""
        raise LabError(
            f"unknown model {model!r}, expected a preset ({', '.join(PRESETS)}), a published shape "
            f"({', '.join(PUBLISHED)}), a model type of transformers or the path of a config.json{hint}"
        )
    return transformers.CONFIG_MAPPING[model]()


def from_configuration(model: str, config: Any) -> "nn.Module":
    """The architecture that the configuration names, or the first auto class that knows the configuration."""
    from spectrim.lab.model import quiet_transformers

    transformers = quiet_transformers()
    named = next(iter(config.architectures or ()), None)
    architecture = getattr(transformers, named, None) if named else None
    autos = (getattr(transformers, name) for name in AUTO_CLASSES)
    auto = next((auto for auto in autos if type(config) in auto._model_mapping), None)
    build = architecture or (auto and auto.from_config)
    if build is None:
        raise LabError(f"model {model!r}: no architecture of transformers builds {type(config).__name__}")
    try:
        built: nn.Module = build(config)
    except Exception as error:
        # A model's constructor may fail in any way on a configuration that does not fit it.
        raise LabError(f"model {model!r} cannot be built: {type(error).__name__}: {first_line(error)}") from error
    return built


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
