"""``spectrim plan``: shows what a recipe would do to a model, or what recipes would cost on many ranks."""

import json
from dataclasses import asdict, replace
from typing import Annotated, Any, cast

import typer

from spectrim.lab.cli.flags import trust_named
from spectrim.lab.cli.shared_options import print_tables
from spectrim.lab.errors import LabError
from spectrim.lab.models.published import PUBLISHED
from spectrim.lab.planning.plan import (
    DEFAULT_HARDWARE,
    DEFAULT_RECIPE,
    DEFAULT_SHARD,
    SCALING_RECIPES,
    plan,
    plan_scaling,
)
from spectrim.lab.planning.plan_tables import plan_table, scaling_table
from spectrim.lab.planning.scaling import PARALLEL, Cluster, ParallelMode

__all__ = ["plan_command"]


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
            print_tables(plan_table(description))
        return
    if lr is not None:
        raise LabError(f"--lr {lr}: it changes nothing in what a step costs, leave it out with --world")
    parallel = parallel or "fsdp"
    if parallel == "hsdp" and shard is None:
        shard = DEFAULT_SHARD
    cluster = Cluster(world=world, parallel=cast("ParallelMode", parallel), shard=shard)
    chosen: dict[str, Any] = {"flops": flops, "bandwidth": bandwidth, "tokens": tokens}
    hardware = replace(DEFAULT_HARDWARE, **{key: value for key, value in chosen.items() if value is not None})
    active, projections = plan_scaling(model, [recipe] if recipe else SCALING_RECIPES, cluster, hardware)
    if as_json:
        head = {"model": model, "active_parameters": active, **asdict(cluster), **asdict(hardware)}
        print(json.dumps({**head, "recipes": [asdict(projection) for projection in projections]}, indent=2))
    else:
        print_tables(scaling_table(model, active, projections, cluster, hardware))
