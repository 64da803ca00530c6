"""The tables and the picture of the benchmarks of operators and optimizers."""

from functools import partial
from pathlib import Path

from spectrim.lab.bench.operator_bench import OperatorRow, SpikeRow
from spectrim.lab.bench.optimizer_bench import OptimizerRow
from spectrim.lab.files import write_atomically
from spectrim.lab.tables import TextTable, header_and_rows

__all__ = ["clip_cells", "optimizer_cells", "save_errors", "spike_cells", "table"]


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


def table(title: str, lines: list[dict[str, str]]) -> TextTable:
    """A table of lines that share their columns."""
    return TextTable(header_and_rows(lines), title=title, words=("spectrum", "dtype", "solver"))


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
        metadata = {"Date": None} if suffix == "svg" else {}
        write_atomically(path, partial(figure.savefig, format=suffix, metadata=metadata))
