"""Writes docs/solvers.md and its picture from the benchmark of operators."""

import argparse
from pathlib import Path

import torch

from spectrim.lab import bench_cli, bench_operators
from spectrim.lab.files import write_text

DOCS = Path(__file__).parent.parent / "docs"
ACCURACY_SHAPE = (256, 512)
DTYPES = ["float32", "bfloat16"]

TEXT = """\
# Solvers of spectral clipping

<!-- Written by benchmarks/solvers.py. Edit that. -->

`soft_clip(X, c)` is (I + XXᵀ/c²)^(-1/2) X. Its cost is the inverse square root; solvers differ in how they take it.

| solver | what it does | accuracy |
|---|---|---|
| `rational` | Zolotarev's best rational function: κ is read, a pole costs one inverse | `tol`, for σ₁/c to 10⁶ |
| `minimax` | best odd quintics on the known interval: products alone, nothing is read | 1e-3, for σ₁/c to 10³ |
| `reference` | eigendecomposition of the float64 Gram matrix | 1e-6 and better |
| `newton_schulz` | the paper's ten coupled steps | none stated; see below |

`auto` is `minimax` on accelerators, under `torch.compile` and on fake tensors. On the CPU it is `reference` up to a
smaller side of 64 and `rational` beyond. `hard_clip` always takes the eigendecomposition of the float64 Gram matrix.

A Gram matrix squares the condition number, so in float32 a spike drowns everything near the threshold. `rational`
first reflects the matrix so that the spike lies in its first rows: the Gram matrix is then graded, and rounding stays
with the spike. From the first pole it knows how large the error from rounding will be, and starts over in float64 if
that is too much. `minimax` takes the Gram matrix anew every
three steps, as the spike shrinks.

## Time

{machine}. Medians of {repeats} interleaved rounds; read ratios, not milliseconds.
Spiky Adam-like directions, σ₁/c = 100. "vs ten NS" and "vs SVD": how many times faster. "over c": by how much the
result breaks its norm bound. "/ products": time over that of the two products that nothing avoids.

{times}

Geometric mean of `auto` against ten Newton-Schulz steps: {mean:.2f}.

## Accuracy

{accuracy_shape}, relative Frobenius error against float64 singular values; "over c" in brackets where it is not zero.

{accuracy}

![Error against κ](images/solver_errors.svg)

## Spectra's shaping

The shaped matrix is never formed: M is read for the power step (twice), for the tail's norm, and for the step itself.

{spikes}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--shapes", default="small")
    arguments = parser.parse_args()
    shapes = bench_operators.parse_shapes(arguments.shapes)
    solvers = list(bench_operators.SOLVERS)
    with bench_operators.threads(arguments.threads):
        rows = bench_operators.bench_operators(
            shapes, solvers=solvers, dtypes=["float32"], spectra=["adam"], repeats=arguments.repeats, progress=print
        )
        spikes = bench_operators.bench_spike(shapes, repeats=arguments.repeats)
        curves = bench_operators.error_by_kappa(solvers, DTYPES)
        accuracy = accuracy_lines(solvers)
    DOCS.joinpath("images").mkdir(parents=True, exist_ok=True)
    bench_cli.save_errors(curves, DOCS / "images" / "solver_errors.svg")
    ratios = torch.tensor([row.faster_than_newton_schulz for row in rows if row.solver == "auto"])
    text = TEXT.format(
        machine=f"CPU, {arguments.threads} threads, torch {torch.__version__}, float32",
        repeats=arguments.repeats,
        times=markdown([bench_cli.clip_cells(row) for row in rows]),
        mean=ratios.log().mean().exp().item(),
        accuracy_shape="x".join(map(str, ACCURACY_SHAPE)),
        accuracy=markdown(accuracy),
        spikes=markdown([bench_cli.spike_cells(row) for row in spikes]),
    )
    write_text(DOCS / "solvers.md", text)


def accuracy_lines(solvers: list[str]) -> list[dict[str, str]]:
    """One line for every spectrum, dtype and σ₁/c; one column for every solver."""
    lines = []
    for ratio in (1e-3, 1.0, 30.0, 1e3):
        rows = bench_operators.bench_operators(
            [ACCURACY_SHAPE],
            solvers=solvers,
            dtypes=DTYPES,
            spectra=list(bench_operators.SPECTRA),
            ratio=ratio,
            repeats=1,
            progress=print,
        )
        for first in range(0, len(rows), len(solvers)):
            group = rows[first : first + len(solvers)]
            line = {"spectrum": group[0].spectrum, "dtype": group[0].dtype, "σ₁/c": f"{ratio:g}"}
            for row in group:
                over = f" ({row.bound_violation:.0e})" if row.bound_violation > 1e-6 else ""
                line[f"`{row.solver}`"] = f"{row.error:.0e}{over}"
            lines.append(line)
    return lines


def markdown(lines: list[dict[str, str]]) -> str:
    """A Markdown table of lines that share their columns."""
    rows = [list(lines[0]), ["---"] * len(lines[0]), *(list(line.values()) for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
