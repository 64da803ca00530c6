"""``spectrim bench``: what the operators and the optimizers cost, as tables, JSON and a picture."""

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from spectrim.lab import bench_operators, bench_optimizers
from spectrim.lab.bench_operators import DTYPES, SHAPE_SETS, SOLVERS, SPECTRA, OperatorRow, SpikeRow
from spectrim.lab.bench_optimizers import BLOCKS, OptimizerRow
from spectrim.lab.bench_training import training_command
from spectrim.lab.errors import LabError
from spectrim.lab.files import write_atomically, write_json

__all__ = ["bench_app"]

bench_app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Measure operators and optimizers.",
)


@bench_app.callback()
def bench() -> None:
    """Measure operators and optimizers."""


bench_app.command("training")(training_command)


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
    spectra, sizes = chosen(spectrum, SPECTRA, "spectrum"), bench_operators.parse_shapes(shapes)
    if not ratio > 0:
        raise LabError(f"ratio {ratio}: expected a positive number")
    if plot is not None and plot.suffix not in (".svg", ".png"):
        raise LabError(f"plot {str(plot)!r}: expected a name that ends in .svg or .png")
    console = Console() if sys.stdout.isatty() else Console(width=160)
    with bench_operators.threads(threads) as count, console.status("starting") as status:
        rows = bench_operators.bench_operators(
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
        spikes = bench_operators.bench_spike(sizes, device=device, repeats=repeats)
        if plot is not None:
            status.update("error against κ")
            save_errors(bench_operators.error_by_kappa(solvers, dtypes, device=device), plot)
    title = f"soft clip, σ₁/c = {ratio:g}, {device}, {count} threads, medians of {repeats}"
    console.print(table(title, [clip_cells(row) for row in rows]))
    console.print(table(f"spike shaping, float32, {device}, {count} threads", [spike_cells(row) for row in spikes]))
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
    console = Console() if sys.stdout.isatty() else Console(width=160)
    with bench_operators.threads(threads) as count, console.status("starting") as status:
        rows = bench_optimizers.bench_optimizers(
            block=block,
            blocks=blocks,
            contenders=names,
            repeats=repeats,
            compiled=compiled,
            device=device,
            progress=status.update,
        )
    title = f"one step on {blocks} blocks of {block}, {device}, {count} threads, medians of {repeats}"
    console.print(table(title, [optimizer_cells(row) for row in rows]))
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


def optimizer_cells(row: OptimizerRow) -> dict[str, str]:
    """One line of the table of optimizers, by column."""
    return {
        "optimizer": row.name,
        "ms": f"{row.step_ms:.2f}",
        "/ fused AdamW": f"{row.to_fused_adamw:.2f}",
        "Muon /": f"{1 / row.to_muon:.1f}",
        "state MB": f"{row.state_bytes / 1e6:.1f}",
        "extra MB": f"{row.extra_bytes / 1e6:.1f}",
        "not orthogonal": f"{row.orthogonality:.2f}",
    }


def chosen(text: str, choices: tuple[str, ...], name: str) -> list[str]:
    """The values of a comma-separated option."""
    values = list(choices) if text == "all" else [value.strip() for value in text.split(",")]
    for value in values:
        if value not in choices:
            raise LabError(f"{name} {value!r}: expected {', '.join(choices)}, or all")
    return values


def clip_cells(row: OperatorRow) -> dict[str, str]:
    """One line of the table of solvers, by column."""
    return {
        "shape": "x".join(map(str, row.shape)),
        "spectrum": row.spectrum,
        "dtype": row.dtype,
        "solver": row.solver,
        "error": f"{row.error:.1e}",
        "over c": f"{row.bound_violation:.1e}" if row.bound_violation else "0",
        "ms": f"{row.milliseconds:.1f}",
        "vs ten NS": f"{row.faster_than_newton_schulz:.2f}",
        "vs SVD": "" if row.faster_than_svd is None else f"{row.faster_than_svd:.1f}",
        "/ products": f"{row.times_two_products:.2f}",
        "GFLOP": f"{row.gigaflops:.2f}",
        "MB": f"{row.megabytes:.0f}",
    }


def spike_cells(row: SpikeRow) -> dict[str, str]:
    """One line of the table of spike shaping, by column."""
    return {
        "shape": "x".join(map(str, row.shape)),
        "rank": str(row.rank),
        "follow ms": f"{row.track_milliseconds:.2f}",
        "shape ms": f"{row.shape_milliseconds:.2f}",
        "apply ms": f"{row.apply_milliseconds:.2f}",
        "X ← X − ηM ms": f"{row.pass_milliseconds:.2f}",
        "times that": f"{row.times_passes:.1f}",
    }


WORDS = ("shape", "spectrum", "dtype", "solver", "optimizer")


def table(title: str, lines: list[dict[str, str]]) -> Table:
    """A table of lines that share their columns; words to the left, numbers to the right."""
    result = Table(title=title, title_justify="left")
    for column in lines[0]:
        result.add_column(column, justify="left" if column in WORDS else "right")
    for line in lines:
        result.add_row(*line.values())
    return result


def save_errors(curves: dict[tuple[str, str], list[tuple[float, float]]], path: Path) -> None:
    """Draw error against κ, a line for every solver and dtype."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "spectrim", "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        for (solver, dtype), points in curves.items():
            axes.loglog(*zip(*points, strict=True), label=f"{solver}, {dtype}", marker=".")
        axes.axhline(1e-3, color="black", linewidth=0.8, linestyle=":")
        axes.set_xlabel("κ = 1 + σ₁²/c²")
        axes.set_ylabel("relative Frobenius error")
        axes.set_title("Soft clip of ten spikes over a tail near the threshold, 256 x 512", loc="left")
        axes.legend(frameon=False, fontsize=8)
        suffix = path.suffix.removeprefix(".")
        metadata: dict[str, Any] = {"Date": None} if suffix == "svg" else {}
        draw: Callable[[Any], object] = lambda file: figure.savefig(file, format=suffix, metadata=metadata)  # noqa: E731
        write_atomically(path, draw)
