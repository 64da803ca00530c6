"""``spectrim bench``: what the operators and the optimizers cost, as tables, JSON and a picture."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from spectrim.lab.bench import operator_bench, optimizer_bench
from spectrim.lab.bench.bench_tables import clip_cells, optimizer_cells, save_errors, spike_cells, table
from spectrim.lab.bench.operator_bench import DTYPES, SHAPE_SETS, SOLVERS, SPECTRA
from spectrim.lab.bench.optimizer_bench import BLOCKS
from spectrim.lab.bench.training_bench import bench_training, lines
from spectrim.lab.cli.shared_options import print_tables
from spectrim.lab.errors import LabError
from spectrim.lab.files import write_json

__all__ = ["bench_app"]

bench_app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Measure operators and optimizers.",
)


@bench_app.callback()
def bench() -> None:
    """Measure operators and optimizers."""


@bench_app.command()
def operators(
    shapes: Annotated[
        str, typer.Option(help=f"{', '.join(SHAPE_SETS)}, or a list such as 768x3072,8x512x512.")
    ] = "small",
    solver: Annotated[str, typer.Option(help=f"Comma-separated, or all: {', '.join(SOLVERS)}.")] = "auto,newton_schulz",
    dtype: Annotated[str, typer.Option(help=f"Comma-separated, or all: {', '.join(DTYPES)}.")] = "float32",
    spectrum: Annotated[str, typer.Option(help=f"Comma-separated, or all: {', '.join(SPECTRA)}.")] = "adam",
    ratio: Annotated[float, typer.Option(help="Largest singular value over the threshold.")] = 100.0,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds, of which the median counts.")] = 5,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw error against κ to this .svg or .png.")] = None,
) -> None:
    """Accuracy, time, arithmetic and traffic of every way to clip, and the time of Spectra's shaping.

    "over c": by how much the result breaks its norm bound. "vs ten NS", "vs SVD": how many times faster than the
    paper's ten Newton-Schulz steps and than a singular value decomposition. "/ products": time over that of XXᵀ and
    of one more product with X, which nothing avoids.
    """
    solvers, dtypes = chosen(solver, SOLVERS, "solver"), chosen(dtype, tuple(DTYPES), "dtype")
    spectra, sizes = chosen(spectrum, SPECTRA, "spectrum"), operator_bench.parse_shapes(shapes)
    if not ratio > 0:
        raise LabError(f"ratio {ratio}: expected a positive number")
    if plot is not None and plot.suffix not in (".svg", ".png"):
        raise LabError(f"plot {str(plot)!r}: expected a name that ends in .svg or .png")
    with operator_bench.threads(threads) as count, Console(stderr=True).status("starting") as status:
        rows = operator_bench.bench_operators(
            sizes,
            solvers=solvers,
            dtypes=dtypes,
            spectra=spectra,
            ratio=ratio,
            device=device,
            repeats=repeats,
            progress=status.update,
        )
        status.update("shaping of the spike")
        spikes = operator_bench.bench_spike(sizes, device=device, repeats=repeats)
        if plot is not None:
            status.update("error against κ")
            save_errors(operator_bench.error_by_kappa(solvers, dtypes, device=device), plot)
    title = f"soft clip, σ₁/c = {ratio:g}, {device}, {count} threads, medians of {repeats}"
    print_tables(
        table(title, [clip_cells(row) for row in rows]),
        table(f"spike shaping, float32, {device}, {count} threads", [spike_cells(row) for row in spikes]),
    )
    if json_path is not None:
        result = {
            "device": device,
            "threads": count,
            "repeats": repeats,
            "clip": [asdict(row) for row in rows],
            "spike": [asdict(row) for row in spikes],
        }
        write_json(json_path, result)


@bench_app.command()
def optimizers(
    block: Annotated[str, typer.Option(help=f"Shapes of a transformer block: {', '.join(BLOCKS)}.")] = "gpt2-small",
    blocks: Annotated[int, typer.Option(min=1, help="How many such blocks are stepped.")] = 2,
    contender: Annotated[
        str, typer.Option(help="Comma-separated, or all; an unknown one is answered with their names.")
    ] = "all",
    compiled: Annotated[bool, typer.Option(help="Measure spectrim's steps under torch.compile.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds, of which the median counts.")] = 15,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")] = None,
) -> None:
    """Time, memory and orthogonality of a step of every recipe, beside torch's AdamW and Muon.

    All contenders take turns on gradients of their own copy of the weights. "/ fused AdamW": time over that of torch's
    fused AdamW. "Muon /": how many times faster than torch.optim.Muon. "extra": the most that tensors made during a
    step held at a time. "not orthogonal": ‖UUᵀ/s − I‖_F/√m of the update U, zero for an orthogonal one.
    """
    names = () if contender == "all" else tuple(name.strip() for name in contender.split(","))
    with operator_bench.threads(threads) as count, Console(stderr=True).status("starting") as status:
        rows = optimizer_bench.bench_optimizers(
            block=block,
            blocks=blocks,
            contenders=names,
            repeats=repeats,
            compiled=compiled,
            device=device,
            progress=status.update,
        )
    title = f"one step on {blocks} blocks of {block}, {device}, {count} threads, medians of {repeats}"
    print_tables(table(title, [optimizer_cells(row) for row in rows]))
    if json_path is not None:
        result = {
            "block": block,
            "blocks": blocks,
            "device": device,
            "threads": count,
            "repeats": repeats,
            "torch": torch.__version__,
            "optimizers": [asdict(row) for row in rows],
        }
        write_json(json_path, result)


def chosen(text: str, choices: tuple[str, ...], name: str) -> list[str]:
    """The values of a comma-separated option."""
    values = list(choices) if text == "all" else [value.strip() for value in text.split(",")]
    for value in values:
        if value not in choices:
            raise LabError(f"{name} {value!r}: expected {', '.join(choices)}, or all")
    return values


@bench_app.command("training")
def training(
    preset: Annotated[str, typer.Option(help="Model preset: tiny, 1m, 2m, 10m, 25m, 90m.")] = "10m",
    recipe: Annotated[str, typer.Option(help="What the lab trains with; the bare loop has torch's AdamW.")] = "adamw",
    steps: Annotated[int, typer.Option(min=4, help="Steps of either loop.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 16,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens in a sequence.")] = 128,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Text; repeatable. Default: State of the Union addresses.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the model in both loops.")] = False,
    cache_dir: Annotated[Path | None, typer.Option(help="Where tokens are cached.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
) -> None:
    """Tokens a second of the lab's training loop and of a bare one, and what evaluation, log and checkpoints cost."""
    row = bench_training(
        preset=preset,
        recipe=recipe,
        steps=steps,
        batch_size=batch_size,
        sequence_length=sequence_length,
        sources=tuple(data or ()),
        compiled=compiled,
        cache_dir=cache_dir,
    )
    print("\n".join(lines(row)))
    if json_path is not None:
        write_json(json_path, asdict(row))
